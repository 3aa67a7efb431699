"""A run of the embedded model that takes seconds: its flags, and what it leaves."""

import json
from pathlib import Path

SMALL = [
    "--config", "configs/tiny.yaml", "--max_length", "16", "--batch_size", "1", "--rank", "4", "--dropout", "0.2",
    "--set", "data.max_train_samples=5", "--set", "data.max_eval_samples=2", "--set", "training.save_total_limit=null",
]  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage(folder: Path, name: str) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


def result(folder: Path) -> tuple[bytes, list[tuple]]:
    """Return the adapter's bytes and the logged numbers that do not depend on the clock."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")
    return (folder / "adapter_model.safetensors").read_bytes(), [tuple(entry.get(key) for key in keys) for entry in entries]


def log_steps(folder: Path) -> list[str]:
    """Return the starts of the step lines of the log: "step 1/7", "step 4" (an evaluation)."""
    lines = (folder / "training_log.txt").read_text().splitlines()
    return [line.partition(":")[0] for line in lines if line.startswith("step ")]
