"""The output folder of a run: may it be written, what does it hold, where to go on from, and how results are put into it.

A file that marks a run as finished (the adapter's weights) is moved into place last, so that it is whole or absent.
"""

import os
from pathlib import Path

from qlora_kit.config import MIB
from qlora_kit.errors import UserError
from qlora_kit.output.checkpoints import (
    PREFIX,
    REPLACED,
    checkpoint_bytes,
    missing_bytes,
)

CONFIG, PASSPORT, CHECKPOINTS = "config.yaml", "run.json", "checkpoints"
LOG, METRICS, CURVES = "training_log.txt", "metrics.jsonl", "training_curves.png"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
OUTPUT_FILES = (*ADAPTER_FILES, LOG, METRICS, CURVES, CONFIG, PASSPORT)  # --overwrite removes these and the checkpoints
TOKENIZER_BYTES = 16 * MIB  # Qwen's is 11 MiB; the log and the curves are small


def check_output_dir(name: str, overwrite: bool, resume: bool) -> Path:
    """The output folder, when a run may write there. Creates and removes nothing.

    Raises:
        UserError: it cannot be written, or holds a run that was neither to be resumed nor overwritten.
    """
    folder = Path(name).expanduser()
    key = f"training.output_dir: {name}"
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{key}: {existing} is a file, not a folder; name another --output_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{key}: cannot be written; change its permissions or name another --output_dir")
    begun = [*folder.glob(f"{CHECKPOINTS}/{PREFIX}*"), *folder.glob(f"{CHECKPOINTS}/{REPLACED}*")]
    finished, unfinished = (folder / ADAPTER_FILES[0]).exists(), bool(begun)
    if not resume and not overwrite and (finished or unfinished):
        what = "a finished adapter" if finished else "an unfinished run"
        raise UserError(
            f"{key}: already holds {what}; continue it with --resume, replace it with --overwrite, or name another --output_dir"
        )
    return folder


def check_disk(folder: Path, parameters: int, optimizer_bytes: float) -> None:
    """Refuse a run whose first checkpoint and adapter would not fit on the disk.

    Args:
        parameters: of the adapter.

    Raises:
        UserError: with what is missing.
    """
    needed = checkpoint_bytes(parameters, optimizer_bytes) + 4.0 * parameters + TOKENIZER_BYTES
    missing = missing_bytes(folder, needed)
    if missing > 0:
        raise UserError(
            f"training.output_dir: {folder}: {missing / MIB:,.0f} MiB are missing on that disk of the {needed / MIB:,.0f} that a "
            "checkpoint and the adapter take; make room, or name another --output_dir"
        )
