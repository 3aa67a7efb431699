"""A run of two layers of the embedded model, which takes about a second: its flags, and what it leaves."""

import atexit
import json
import shutil
import tempfile
from pathlib import Path

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny-qwen2"


def copy_two_layers() -> Path:
    """Write the embedded model without its last four layers to a temporary folder: a run takes half the time."""
    folder = Path(tempfile.mkdtemp(prefix="qlora-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.py", "*.md"), dirs_exist_ok=True)
    config = json.loads((TINY / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "layer_types": config["layer_types"][:2]}
    (folder / "config.json").write_text(json.dumps(config))
    content = (TINY / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    kept, weights = {}, b""
    for name, tensor in json.loads(content[8:start]).items():
        if not name.startswith(tuple(f"model.layers.{number}." for number in range(2, 6))) and name != "__metadata__":
            begin, end = tensor["data_offsets"]
            kept[name] = tensor | {"data_offsets": [len(weights), len(weights) + end - begin]}
            weights += content[start + begin : start + end]
    header = json.dumps(kept | {"__metadata__": {"format": "pt"}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weights)
    return folder


TWO_LAYERS = copy_two_layers()
SMALL = [
    "--config", "configs/tiny.yaml", "--model_name", str(TWO_LAYERS), "--max_length", "16", "--batch_size", "1", "--rank", "4",
    "--dropout", "0.2",
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
