"""The classes and functions of the course under their own names, for notebooks and exercises.

    from finetuning_lessons.course import LoRALayer, compare_lora_ranks, sample_data

The names and arguments are those of the course's source. Where its way misleads, the docstring says so and names the lesson that
shows the other way.
"""

import statistics
import time
from importlib.util import find_spec
from typing import Any

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from finetuning_lessons.attention import LoRAAttention
from finetuning_lessons.layers import LoRALayer
from finetuning_lessons.lesson import BLUE, ORANGE, drawing
from finetuning_lessons.memory_charts import visualize_lora_efficiency, visualize_memory_requirements, visualize_qlora_memory
from finetuning_lessons.training_loop import InstructionDataset, load_gpt2
from finetuning_lessons.words import LOSS, STEP, text
from qlora_kit.data.formats import alpaca_to_text, sharegpt_to_text

__all__ = [
    "DataFormatter", "InstructionDataset", "LoRAAttention", "LoRALayer", "alpaca_example", "compare_lora_ranks",
    "instruction_example", "sample_data", "setup_lora_training", "sharegpt_example", "simple_lora_training_loop",
    "training_config", "visualize_lora_efficiency", "visualize_memory_requirements", "visualize_qlora_memory",
]  # fmt: skip

alpaca_example = {
    "instruction": "將以下句子翻譯成英文",
    "input": "深度學習是人工智慧的一個重要分支。",
    "output": "Deep learning is an important branch of artificial intelligence.",
}
sharegpt_example = {
    "conversations": [
        {"from": "human", "value": "什麼是機器學習？"},
        {"from": "gpt", "value": "機器學習是人工智慧的一個分支..."},
    ]
}
instruction_example = {"text": alpaca_to_text(alpaca_example)}
sample_data = [
    {"instruction": "Translate to English", "input": "你好", "output": "Hello"},
    {"instruction": "Translate to English", "input": "謝謝", "output": "Thank you"},
    {"instruction": "What is the capital of France?", "input": "", "output": "Paris"},
    {"instruction": "Summarize this text", "input": "Machine learning is...", "output": "ML is AI that learns from data."},
]
# Arguments of transformers.TrainingArguments. In config.yaml the same settings have the keys of section `training`.
training_config = {
    "output_dir": "./lora-output",
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "learning_rate": 2e-4,
    "warmup_steps": 100,
    "logging_steps": 10,
    "save_steps": 500,
    "fp16": torch.cuda.is_available(),
    "optim": "adamw_torch",
}
RANKS = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 15  # runs of each rank that are timed


class DataFormatter:
    """Turn records into text. Only apply_chat_template writes what a chat model was trained on; the others are conventions."""

    @staticmethod
    def alpaca_to_text(example: dict[str, Any], *templates: str, **named: str) -> str:
        """Return a record as text. Templates: instruction_template, input_template and response_template."""
        return alpaca_to_text(example, *templates, **named)

    @staticmethod
    def sharegpt_to_text(example: dict[str, Any], *templates: str, **named: str) -> str:
        """Return a conversation as text. Templates: human_template and assistant_template."""
        return sharegpt_to_text(example, *templates, **named)

    @staticmethod
    def apply_chat_template(messages: list[dict[str, str]], tokenizer: Any) -> str:
        """Return messages of `role` and `content` as one text: `Role: content` lines for a tokenizer without a template."""
        if getattr(tokenizer, "chat_template", None):
            return tokenizer.apply_chat_template(messages, tokenize=False)
        return "".join(f"{message['role'].capitalize()}: {message['content']}\n" for message in messages)


def setup_lora_training() -> bool:
    """Print whether the packages for LoRA are installed, and return it. `python -m qlora_kit.doctor` runs them as well."""
    missing = [name for name in ("transformers", "peft", "bitsandbytes") if find_spec(name) is None]
    if missing:
        print(text("✗ missing", "✗ 缺少套件") + f": pip install {' '.join(missing)}")
    else:
        print(text("✓ transformers, peft and bitsandbytes are installed", "✓ 已安裝 transformers、peft 與 bitsandbytes"))
    return not missing


def compare_lora_ranks(model_dim: int = 768) -> list[dict[str, float]]:
    """Compare LoRA of several ranks on a square layer; draws the share of parameters and the error.

    The time says what an unmerged adapter costs in a forward pass and nothing of how well a rank learns. The error is that of the
    best update of each rank for a random matrix, whose singular values are all of one size: the hardest case. Learned updates are
    closer to low rank; finetuning_lessons/rank_study.py trains ranks and compares their losses.

    Args:
        model_dim: input and output size of the layer.

    Returns:
        For each rank: rank, trainable_params, param_ratio (percent of the layer), forward_time_ms (median of runs in turns, with
        their range: fastest_ms, slowest_ms) and approximation_error, ‖W - W_r‖ / ‖W‖ in the Frobenius norm, W_r from the singular
        values (Eckart and Young, 1936).
    """
    layers = {rank: LoRALayer(model_dim, model_dim, rank=rank, alpha=rank * 2) for rank in RANKS if rank <= model_dim}
    x = torch.randn(1, 128, model_dim)  # (B, T, model_dim)
    times: dict[int, list[float]] = {rank: [] for rank in layers}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for rank, layer in layers.items():
                start = time.perf_counter()
                layer(x)
                times[rank].append(1000 * (time.perf_counter() - start))
    squares = torch.linalg.svdvals(torch.randn(model_dim, model_dim)).square()  # (model_dim,), descending
    results = [
        {
            "rank": rank,
            "trainable_params": layer.trainable_params,
            "param_ratio": 100 * layer.trainable_params / model_dim**2,
            "forward_time_ms": statistics.median(times[rank]),
            "fastest_ms": min(times[rank]),
            "slowest_ms": max(times[rank]),
            "approximation_error": float((squares[rank:].sum() / squares.sum()).sqrt()),
        }
        for rank, layer in layers.items()
    ]
    with drawing():
        _, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
        names = [str(result["rank"]) for result in results]
        left.bar(names, [result["param_ratio"] for result in results], color=BLUE)
        left.set(title=text("Trained parameters", "可訓練參數"), xlabel="rank", ylabel=text("% of the layer", "占原本層的 %"))
        right.plot(names, [result["approximation_error"] for result in results], "o-", color=ORANGE)
        right.set(title=text("A random matrix, approximated", "近似一個隨機矩陣"), xlabel="rank", ylim=(0, 1.05))
        right.set_ylabel(text("error / size of the matrix", "誤差 / 矩陣大小"))
        plt.show()
    return results


def simple_lora_training_loop() -> list[float]:
    """Train LoRA on GPT-2 with four records, draw the losses and return them, in nats per token.

    Four records show a loop and teach nothing; finetuning_lessons/training_loop.py trains on more, and compares with the Trainer.
    Only the answers and their ends are trained: the source trained the prompts too, so that the loss was mostly theirs.
    """
    batch_size, learning_rate, num_epochs = 2, 1e-4, 2
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_gpt2()
    base.model.requires_grad_(False)
    configuration = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    )
    model = get_peft_model(base.model, configuration).to(device).train()
    dataset = InstructionDataset(sample_data, base.tokenizer, max_length=128, train_on="assistant")
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    settings = f"epochs={num_epochs}, batch_size={batch_size}, lr={learning_rate:g}"
    print(text(f"Training {base.description} ({settings})", f"開始訓練 {base.chinese}（{settings}）"))
    losses: list[float] = []
    for epoch in range(1, num_epochs + 1):
        for batch in loader:
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        mean = statistics.mean(losses[-len(loader) :])
        print(text(f"Epoch {epoch}/{num_epochs}: mean loss {mean:.4f}", f"Epoch {epoch}/{num_epochs}：平均損失 {mean:.4f}"))
    with drawing():
        _, axes = plt.subplots(figsize=(9, 4), layout="constrained")
        axes.plot(range(1, len(losses) + 1), losses, color=BLUE)
        axes.set(title=text("Training loss", "訓練損失"), xlabel=text(*STEP), ylabel=text(*LOSS))
        plt.show()
    return losses
