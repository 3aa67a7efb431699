"""LoRA on GPT-2 with a training loop in plain PyTorch, compared with the same run of train_qlora.py.

    python -m finetuning_lessons.training_loop

GPT-2's projections are Conv1D layers with weights (in, out); `c_attn` is q, k and v in one, and `c_proj` is the output projection
of attention and of the MLP. The lesson trains the Hub's gpt2 if it can be reached, and a small one with random weights if not.

train_qlora.py trains GPT-2 through the library's layers, because its fast path covers only models built like Llama. For equal
numbers, the script gets these settings: no 4-bit weights, fp32, 32-bit AdamW, a constant learning rate, no dropout, no clipping,
no packing. Both train on answers alone.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, set_seed

from finetuning_lessons.layers import count_parameters
from finetuning_lessons.lesson import (
    BLUE,
    GREY,
    ORANGE,
    ROOT,
    begin,
    create_parser,
    finish,
    load_tokenizer,
    picture,
    print_table,
    print_text,
    progress,
)
from finetuning_lessons.words import text
from qlora_kit import cli
from qlora_kit.data.formats import alpaca_to_text
from qlora_kit.data.preview import mark_trained
from qlora_kit.data.tokenizing import EncodedRecord
from qlora_kit.errors import Failed
from qlora_kit.model.hub import go_offline_if_unreachable

RECORDS = ROOT / "samples" / "alpaca.jsonl"
BATCH = 4
EPOCHS = 2
LENGTH = 64  # tokens; no record is longer
LEARNING_RATE = 2e-3
RANK, ALPHA = 8, 16
TARGETS = ["c_attn", "c_proj"]
SEED = 42
NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class InstructionDataset(Dataset):
    """Alpaca records as instruction text, each followed by the end-of-sequence token and padded to `max_length` tokens.

    Padding gets label -100 by its position and not by its token id, because padding may be the end-of-sequence token, which must
    be trained. A longer record loses its beginning, as in train_qlora.py, so that its end is always trained.

    Args:
        data: records of instruction, input and output.
        train_on: "all" trains prompts too, "assistant" the answers and their ends alone, as formats.py shows.
    """

    def __init__(self, data: Sequence[dict[str, Any]], tokenizer: Any, max_length: int = 512, train_on: str = "all"):
        if train_on not in ("all", "assistant"):
            raise ValueError(f"train_on {train_on}: should be all or assistant")
        self.data, self.tokenizer, self.max_length, self.train_on = data, tokenizer, max_length, train_on

    def __len__(self) -> int:
        return len(self.data)

    def encode(self, index: int) -> EncodedRecord:
        """Return a record's last `max_length` tokens without padding, and which of them are trained."""
        record = self.data[index]
        encoded = self.tokenizer(alpaca_to_text(record), return_offsets_mapping=True)
        answer = len(alpaca_to_text(record | {"output": ""})) if self.train_on == "assistant" else 0  # where it begins
        begins = [begin for begin, _ in encoded.offset_mapping] + [answer]  # in characters; the end token is trained
        ids = np.array([*encoded.input_ids, self.tokenizer.eos_token_id], dtype=np.int32)
        return EncodedRecord(ids[-self.max_length :], (np.array(begins) >= answer)[-self.max_length :])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask and labels, (max_length,) each."""
        record = self.encode(index)
        ids, trained = torch.from_numpy(record.ids).long(), torch.from_numpy(record.trained)
        padding = (0, self.max_length - len(record))
        return {
            "input_ids": pad(ids, padding, value=self.tokenizer.eos_token_id),
            "attention_mask": pad(torch.ones_like(ids), padding),
            "labels": pad(ids.masked_fill(~trained, -100), padding, value=-100),
        }

    def marked(self, index: int) -> str:
        """Return a record's text with what is trained between [[ and ]]; its first token never is, as nothing predicts it."""
        return mark_trained(self.encode(index), self.tokenizer, coloured=False).plain


def load_records(count: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()[:count]]


class Base(NamedTuple):
    """A base model, and the number of records that it trains on within a minute."""

    model: Any
    tokenizer: Any
    description: str
    chinese: str  # the description
    records: int
    threads: int


def small_gpt2() -> Base:
    """Create a small GPT-2 with random weights and the embedded model's tokenizer."""
    tokenizer = load_tokenizer()
    set_seed(SEED)
    ends: dict[str, Any] = {"bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes: dict[str, Any] = {"n_embd": 192, "n_layer": 4, "n_head": 6, "n_positions": 128, "vocab_size": len(tokenizer)}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ends, **NO_DROPOUT))
    words = (
        "a small GPT-2 of random weights: the Hub's gpt2 cannot be reached",
        "隨機權重的小型 GPT-2（連不上 Hub，拿不到 gpt2）",
    )
    return Base(model, tokenizer, *words, records=48, threads=1)


def load_gpt2() -> Base:
    """Load gpt2 from the Hub or its cache, or create the small GPT-2."""
    go_offline_if_unreachable()
    from_cache = bool(os.environ.get("HF_HUB_OFFLINE"))
    try:
        tokenizer = AutoTokenizer.from_pretrained("gpt2", local_files_only=from_cache)
        model = AutoModelForCausalLM.from_pretrained("gpt2", dtype=torch.float32, local_files_only=from_cache, **NO_DROPOUT)
    except OSError:
        return small_gpt2()
    words = "gpt2 from the Hub, 124 million parameters", "Hub 上的 gpt2，1.24 億個參數"
    return Base(model, tokenizer, *words, records=16, threads=torch.get_num_threads())


def add_lora(model: Any, dropout: float = 0.0) -> Any:
    """Add LoRA to c_attn and c_proj; fan_in_fan_out tells peft that Conv1D weights are (in, out)."""
    model.requires_grad_(False)
    set_seed(SEED)  # decides where A starts
    settings: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": dropout, "target_modules": TARGETS}
    return get_peft_model(model, LoraConfig(**settings, fan_in_fan_out=True, task_type="CAUSAL_LM"))


def shuffle_epoch(dataset: Dataset, count: int, epoch: int) -> Subset:
    """Shuffle as the Trainer does, by the seed and the number of the epoch."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED + epoch))
    return Subset(dataset, order.tolist())


def train_plainly(model: Any, dataset: InstructionDataset) -> list[float]:
    """Train by batch, loss, gradients and step; return each step's loss in nats per token."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0)
    model.train()
    losses = []
    for epoch in range(EPOCHS):
        for batch in DataLoader(shuffle_epoch(dataset, len(dataset), epoch), batch_size=BATCH):
            loss = model(**batch).loss  # mean over the batch's labels, which the model shifts by one
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def write_inputs(model: Any, tokenizer: Any, records: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write the model as a folder for model.name, and the records as instruction text for data.dataset."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with (folder / "records.jsonl").open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps({"text": alpaca_to_text(record)}) + "\n")


def script_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of train_qlora.py for the same run as train_plainly."""
    return {
        "model.name": folder / "model",
        "quantization.load_in_4bit": "false",
        "quantization.compute_dtype": "float32",
        "lora.rank": RANK,
        "lora.alpha": ALPHA,
        "lora.dropout": 0,
        "lora.target_modules": f"[{', '.join(TARGETS)}]",
        "data.dataset": folder / "records.jsonl",
        "data.subset": "null",
        "data.train_on": "assistant",
        "data.packing": "false",
        "data.max_length": LENGTH,
        "data.eval_split": "null",
        "training.num_epochs": EPOCHS,
        "training.batch_size": BATCH,
        "training.gradient_accumulation_steps": 1,
        "training.learning_rate": LEARNING_RATE,
        "training.lr_scheduler": "constant",
        "training.warmup_ratio": 0,
        "training.max_grad_norm": 0,
        "training.gradient_checkpointing": "false",
        "training.optim": "adamw_torch",
        "training.logging_steps": 1,
        "training.device": "cpu",
        "training.seed": SEED,
        "training.output_dir": folder / "output",
    }


def train_with_script(folder: Path, threads: int) -> list[float]:
    """Run train_qlora.py as a command and return the losses that it logged.

    Raises:
        Failed: the exit status is not 0.
    """
    flags = [word for key, value in script_settings(folder).items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "train_qlora", *flags]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if run.returncode:
        raise Failed(f"train_qlora.py ended with status {run.returncode}: {run.stderr.strip().splitlines()[-1]}")
    metrics = (folder / "output" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, metrics) if "loss" in entry]


def loss_rows(plain: list[float], script: list[float]) -> list[list[str]]:
    """Return each step's two losses and their difference."""
    pairs = zip(plain, script, strict=True)
    return [[str(step), f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.1e}"] for step, (a, b) in enumerate(pairs, 1)]


def draw(path: Path, plain: list[float], script: list[float]) -> None:
    steps = range(1, len(plain) + 1)
    with picture(path, rows=2, size=(9, 7)) as (losses, apart):
        losses.plot(steps, plain, color=BLUE, linewidth=5, alpha=0.4, label=text("plain PyTorch loop", "純 PyTorch 迴圈"))
        losses.plot(steps, script, color=ORANGE, linewidth=1.5, label="train_qlora.py")
        for epoch in range(1, EPOCHS):
            label = text("a new epoch begins", "新的一輪開始")
            losses.axvline(epoch * len(plain) / EPOCHS + 0.5, color="black", linestyle=":", linewidth=1, label=label)
        losses.set_title(text("LoRA on GPT-2, twice the same run", "GPT-2 上的 LoRA，同樣的訓練跑兩次"))
        losses.set_ylabel(text("training loss (nats a token)", "訓練損失（nats / token）"))
        losses.legend()
        apart.plot(steps, [b - a for a, b in zip(plain, script, strict=True)], "o", color=GREY)
        apart.axhline(0, color="black", linewidth=1)
        apart.set_title(text("The difference of the two", "兩者的差"))
        apart.set_xlabel(text("optimizer step", "訓練步數"))
        apart.set_ylabel(text("train_qlora.py - loop (nats)", "train_qlora.py - 迴圈（nats）"))


def print_masks(data: Sequence[dict[str, Any]], tokenizer: Any) -> None:
    """Print the first record with what is trained between [[ and ]], for both values of train_on."""
    for train_on in ("all", "assistant"):
        print(f'train_on="{train_on}"\n{InstructionDataset(data, tokenizer, LENGTH, train_on).marked(0)}\n')
    print_text(
        text(
            "Between [[ and ]] is what is trained; the first token of a text never is, as nothing predicts it. The lesson trains "
            "answers and the token that ends them: what people write is context.",
            "[[ 和 ]] 之間的部分會被訓練；文字的第一個 token 沒有東西可以預測它，所以從不訓練。"
            "本課只訓練回答與結束回答的 token：使用者寫的部分只是上下文。",
        )
    )


def print_findings(dataset: InstructionDataset, counts: tuple[int, int], plain: list[float], script: list[float]) -> None:
    trainable, total = counts
    masks = torch.stack([item["attention_mask"] for item in map(dataset.__getitem__, range(len(dataset)))])
    padding = 100 * float((masks == 0).float().mean())
    print_text(
        text(
            f"{trainable:,} of {total:,} parameters are trained ({100 * trainable / total:.2f} %). Padded to {LENGTH} tokens, "
            f"{padding:.0f} % of what the model computes on is padding; train_qlora.py packs records into blocks unless "
            "data.packing is false, as here.",
            f"{total:,} 個參數中訓練 {trainable:,} 個（{100 * trainable / total:.2f}%）。補齊到 {LENGTH} 個 token 時，模型有 "
            f"{padding:.0f}% 的計算花在填充上；除非像這裡把 data.packing 設為 false，train_qlora.py 會把多筆資料裝進同一個區塊。",
        )
    )
    apart = max(abs(a - b) for a, b in zip(plain, script, strict=True))
    if apart < 1e-3:
        verdict = text("the Trainer does what a loop of ten lines does", "Trainer 做的事就是那十行迴圈")
    else:
        verdict = text("they are not the same run", "兩者不是同樣的訓練")
    print_text(
        text(f"The two runs are {apart:.1e} nats apart at most: {verdict}.", f"兩次訓練最多相差 {apart:.1e} nats：{verdict}。")
    )


def main(argv: list[str] | None = None) -> None:
    arguments = begin(create_parser(__doc__, "training_loop"), argv)
    base = load_gpt2()
    torch.set_num_threads(base.threads)
    records = load_records(base.records)
    dataset = InstructionDataset(records, base.tokenizer, LENGTH, train_on="assistant")
    print_text(text(f"Model: {base.description}", f"模型：{base.chinese}"))
    print_masks(records, base.tokenizer)
    with tempfile.TemporaryDirectory() as temporary:
        write_inputs(base.model, base.tokenizer, records, Path(temporary))
        adapted = add_lora(base.model)
        counts = count_parameters(adapted)
        progress(text("training with the loop", "用迴圈訓練"))
        plain = train_plainly(adapted, dataset)
        progress(text("training with train_qlora.py", "用 train_qlora.py 訓練"))
        script = train_with_script(Path(temporary), base.threads)
    header = [text("step", "步"), text("plain loop", "迴圈"), "train_qlora.py", text("apart", "相差")]
    print_table(text("Loss in nats a token", "損失（nats / token）"), header, loss_rows(plain, script), words=0)
    print_findings(dataset, counts, plain, script)
    draw(arguments.output_dir / "training_loop.png", plain, script)
    finish(arguments)


if __name__ == "__main__":
    cli.run(main)
