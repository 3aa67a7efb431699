"""Make small tokenizers of the kinds in use: SentencePiece's, Llama 3's, and the embedded one of Qwen2's kind."""

import copy
import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]

ZEPHYR = """\
{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
LLAMA_2 = """\
{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} \
{{ eos_token }}{% endif %}{% endfor %}"""
PHI_3 = """\
{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}"""
GEMMA = """\
{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
LLAMA_3 = """\
{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
TEMPLATES = {
    "llama 2": ("legacy", LLAMA_2, "<s>", "</s>", []),
    "zephyr": ("legacy", ZEPHYR, "<s>", "</s>", []),
    "mistral": ("first", LLAMA_2, "<s>", "</s>", ["[INST]", "[/INST]"]),
    "phi 3": ("first", PHI_3, "<s>", "<|endoftext|>", ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]),
    "gemma": ("never", GEMMA, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "llama 3": ("bytes", LLAMA_3, "<|begin_of_text|>", "<|eot_id|>",
                ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]),
}  # fmt: skip
STRIPPING = {"phi 3"}  # its added tokens swallow the white space behind them


@cache
def make_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer `tiny`, the embedded one, or one of TEMPLATES."""
    if name == "tiny":
        return AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny-qwen2")
    kind, template, bos, eos, others = TEMPLATES[name]
    words = _make_sentence_piece(kind) if kind != "bytes" else copy.deepcopy(make_tokenizer("tiny").backend_tokenizer)
    added = [AddedToken(text, normalized=False, special=True, rstrip=name in STRIPPING) for text in (bos, eos, *others)]
    words.add_special_tokens(added)
    words.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, words.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token=bos, eos_token=eos, chat_template=template)


def _make_sentence_piece(kind: str) -> Tokenizer:
    """Return a BPE of characters with byte fallback; a space is `▁`.

    Args:
        kind: `legacy` puts a space before the text and behind each added token, `first` before the text only, `never` nowhere.
    """
    words = Tokenizer(models.BPE(**_learn_merges(), unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "legacy":
        words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "first":
        words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        words.normalizer = normalizers.Replace(" ", "▁")
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return words


@cache
def _learn_merges() -> dict:
    """Return vocabulary and merges of 1,000 tokens, 256 of them for bytes."""
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    text = (ROOT / "samples" / "articles.txt").read_text(encoding="utf-8")
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False)
    words.train_from_iterator([text.replace("\n", " ")], trainer)
    learned = json.loads(words.to_str())["model"]
    return {"vocab": learned["vocab"], "merges": [tuple(pair) for pair in learned["merges"]]}
