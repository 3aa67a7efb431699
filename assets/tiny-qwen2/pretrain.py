"""Train the embedded model from scratch: a small Qwen2, on CPython's documentation alone.

    python corpus.py corpus.txt                       # the training text
    python pretrain.py train corpus.txt OUT_DIR       # tokenizer and model from scratch; under a minute on one H200
    python pretrain.py sample OUT_DIR                 # print three continuations

It leaves out distributed training, resuming and chat tuning. The tokenizer has a ChatML template, but this is a base model that
has never seen a conversation.
"""

import argparse
import datetime
import hashlib
import json
import math
import os
import random
import time
from pathlib import Path

from corpus import DOCUMENT_BREAK

os.environ["HF_HUB_OFFLINE"] = "1"  # set before transformers is imported; nothing may come from the network

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # as in Qwen2.5, after all other tokens
VOCAB_SIZE = 6144
CONTEXT = 1024  # tokens
SPLIT = (  # contractions; words with the space before them; single digits; punctuation; line breaks; other space
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{% for message in messages %}
<|im_start|>{{ message['role'] + '\\n' + message['content'] }}<|im_end|>{{ '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant{{ '\\n' }}
{%- endif %}
"""
DROPOUT = 0.1  # in training; 1.5 M different tokens are few for 3.5 M parameters
PATIENCE = 6  # evaluations without a better validation loss before training stops


def to_wikitext_layout(document: str) -> str:
    """Convert a document to Wikitext's layout: a space around each line, headings between equals signs.

    The model is trained on both layouts, so that it knows these tokens when it is fine-tuned on Wikitext.
    """
    lines: list[str] = []
    for paragraph in document.strip().split("\n\n"):
        text = " ".join(paragraph.split())
        if len(text) > 60 or text.endswith((".", ":", "!", "?")):
            lines.append(f" {text} ")
        else:
            lines += [" ", f" = = {text} = = " if lines else f" = {text} = ", " "]
    return "\n".join(lines) + "\n"


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that no text is unknown
    size = VOCAB_SIZE - len(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def create_model() -> Qwen2ForCausalLM:
    end_of_text, _, turn_end = range(VOCAB_SIZE - len(SPECIAL_TOKENS), VOCAB_SIZE)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,  # 6 heads x 32 = 192
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        bos_token_id=end_of_text,
        eos_token_id=turn_end,
        pad_token_id=end_of_text,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text, eos_token_id=[turn_end, end_of_text], pad_token_id=end_of_text
    )
    return model


def add_dropout(model):
    """Add GPT-2's dropout by hooks, which are not saved; Qwen2 itself has only attention dropout."""
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(lambda module, _, output: F.dropout(output, DROPOUT, module.training))


def token_losses(model, block):
    """Return the summed cross-entropy of predicting block[:, 1:], in nats. block: (B, T + 1) token ids."""
    # Without a mask, transformers checks for packed sequences, which waits for the GPU. This dict means causal SDPA without a
    # mask.
    mask = {"full_attention": None}
    with torch.autocast("cuda", torch.bfloat16, enabled=block.is_cuda):
        logits = model(input_ids=block[:, :-1], attention_mask=mask, use_cache=False).logits  # (B, T, vocabulary)
    return F.cross_entropy(logits.flatten(0, 1).float(), block[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def evaluate(model, ids, length: int) -> float:
    """Return the mean loss per token over all of `ids` (1-D), in blocks of `length` predictions; the last may be shorter."""
    model.eval()
    starts = range(0, len(ids) - 1, length)
    total = sum(token_losses(model, ids[start : start + length + 1][None]) for start in starts)
    model.train()
    return total.item() / (len(ids) - 1)


def create_optimizer(model, learning_rate: float):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]  # norms and biases are not decayed
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=matrices[0].is_cuda)


def learning_rate_at(progress: float, peak: float) -> float:
    """Return the learning rate: linear warm-up over the first 5 % of the run, then a cosine down to zero."""
    return peak * min(progress / 0.05, 0.5 * (1 + math.cos(math.pi * progress)))


def fit(model, train_ids, validation_ids, args) -> dict:
    """Train in place, restore the weights of the best evaluation, and return steps and seconds."""
    optimizer = create_optimizer(model, args.learning_rate)
    offsets = torch.arange(args.length + 1, device=train_ids.device)
    best, best_weights, best_step, started = math.inf, None, 0, time.time()
    for step in range(1, args.steps + 1):
        minutes = (time.time() - started) / 60
        progress = min(1.0, max(step / args.steps, minutes / args.minutes))  # the limit that comes first shapes the schedule
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(progress, args.learning_rate)
        starts = torch.randint(len(train_ids) - args.length, (args.batch_size, 1), device=train_ids.device)
        loss = token_losses(model, train_ids[starts + offsets]) / (args.batch_size * args.length)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % args.eval_every == 0 or progress == 1.0:  # no other step waits for the GPU
            validation = evaluate(model, validation_ids, args.length)
            print(f"step {step}: {minutes:.1f} min, loss {loss.item():.4f}, held-out {validation:.4f}", flush=True)
            if validation < best:
                best, best_step = validation, step
                best_weights = {name: weight.clone() for name, weight in model.state_dict().items()}
            if progress == 1.0 or step - best_step >= PATIENCE * args.eval_every:
                break
    model.load_state_dict(best_weights)
    return {"steps_taken": step, "best_step": best_step, "seconds": round(time.time() - started, 1)}


def encode(tokenizer, documents: list[str], device):
    """Return all documents as one 1-D tensor of token ids, with <|endoftext|> after each."""
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([i for ids in encoded for i in [*ids, tokenizer.pad_token_id]], device=device)


def load_data(args, device: str):
    """Return the tokenizer, the ids to train on, the held-out ids (both 1-D), and the facts for the report."""
    data = args.corpus.read_bytes()
    documents, held_out = data.decode().split(DOCUMENT_BREAK), []
    facts = {"corpus_sha256": hashlib.sha256(data).hexdigest(), "corpus_bytes": len(data), "documents": len(documents)}
    random.Random(args.seed).shuffle(documents)
    while sum(map(len, held_out)) < 0.02 * len(data):  # by size, since documents differ by a factor of a hundred
        held_out.append(documents.pop())
    both_layouts = documents + [to_wikitext_layout(document) for document in documents]
    tokenizer = train_tokenizer(both_layouts)
    train_ids, validation_ids = (encode(tokenizer, part, device) for part in (both_layouts, held_out))
    facts |= {
        "held_out_documents": len(held_out),
        "held_out_tokens": len(validation_ids),
        "train_tokens": len(train_ids),
    }
    facts["bytes_per_token"] = round(sum(len(document.encode()) for document in held_out) / len(validation_ids), 3)
    return tokenizer, train_ids, validation_ids, facts


def train(args):
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, train_ids, validation_ids, report = load_data(args, device)
    model = create_model().to(device)
    passes = args.steps * args.batch_size * args.length / len(train_ids)
    print(f"{model.num_parameters():,} parameters; {args.steps} steps are {passes:.1f} passes over the data; {report}")

    add_dropout(model)
    report |= {name: value for name, value in vars(args).items() if isinstance(value, int | float)}  # the settings
    report |= {"dropout": DROPOUT, "parameters": model.num_parameters()}
    report |= fit(model, train_ids, validation_ids, args)
    tokenizer.save_pretrained(args.out)
    model.to(torch.bfloat16).save_pretrained(args.out)
    # Evaluate the file as saved: its weights are rounded, and its rotary frequencies are 32-bit again.
    saved = AutoModelForCausalLM.from_pretrained(args.out).to(device)
    loss = evaluate(saved, validation_ids, args.length)
    report |= {"held_out_loss": round(loss, 4), "held_out_perplexity": round(math.exp(loss), 2)}
    report |= {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__}
    report |= {"transformers": transformers.__version__, "date": datetime.date.today().isoformat()}
    (args.out / "pretraining.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def sample(args):
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    torch.manual_seed(0)
    prompt = tokenizer([args.prompt] * 3, return_tensors="pt")
    output = model.generate(**prompt, do_sample=True, temperature=0.8, top_p=0.95, top_k=0, max_new_tokens=150)
    print("\n\n-----\n\n".join(tokenizer.batch_decode(output, skip_special_tokens=True)))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="train the tokenizer and the model")
    command.add_argument("corpus", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument("--steps", type=int, default=2500)  # x 64 x 512 = 82 M tokens, some 27 passes
    command.add_argument("--batch_size", type=int, default=64)
    command.add_argument("--length", type=int, default=512, help="tokens per crop")
    command.add_argument("--learning_rate", type=float, default=2e-3)
    command.add_argument("--eval_every", type=int, default=100, help="steps")
    command.add_argument("--minutes", type=float, default=4, help="time limit; the schedule ends with it")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=train)
    command = commands.add_parser("sample", help="print three continuations")
    command.add_argument("folder", type=Path)
    command.add_argument("--prompt", default="The Python interpreter")
    command.set_defaults(run=sample)
    return parser.parse_args()


def main():
    args = parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
