"""The output folder: the names of its files, disk space, and atomic writes; output/place.py says which folder may be one."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from qlora_kit.config import GIB, MIB
from qlora_kit.errors import Failed, UserError

CONFIG, PROVENANCE, CHECKPOINTS = "config.yaml", "run.json", "checkpoints"
LOG, METRICS, CURVES = "training_log.txt", "metrics.jsonl", "training_curves.png"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
OUTPUT_FILES = (*ADAPTER_FILES, LOG, METRICS, CURVES, CONFIG, PROVENANCE)
CHECKPOINT_PREFIX = "checkpoint-"  # followed by the step: a folder in CHECKPOINTS
NEW = ".new"  # see output/new_run.py
SAVING, REPLACED, REMOVED = ".saving", ".replaced", ".removed"  # exist only while a checkpoint is written or removed
TOKENIZER_BYTES = 16 * MIB  # Qwen's is 11 MiB; the log and the curves are small
CHECKPOINT_EXTRA_BYTES = MIB  # file headers, the states of the loop and the random generators, the log so far
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust's libraries say it, in exceptions of their own


def check_writable(folder: Path, key: str, name: str, flag: str) -> None:
    """Check that a folder, which may not exist yet, can be written.

    Args:
        key, name: what names the folder, and how.
        flag: what names another one.

    Raises:
        UserError: it cannot.
    """
    existing = existing_parent(folder)
    named = "" if str(existing) == str(name) else f"{existing} "  # which is said already
    if not existing.is_dir():
        raise UserError(key, name, f"{named}is a file, not a folder", f"use another {flag}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(key, name, f"{named}cannot be written", f"change its permissions or use another {flag}")


def existing_parent(path: Path) -> Path:
    """Return the path itself if it exists, else its nearest ancestor that does."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def missing_space(folder: Path, needed: float) -> float:
    """Return how many of the `needed` bytes the disk of a folder, which may not exist yet, lacks; negative if it has more."""
    return needed - shutil.disk_usage(existing_parent(folder)).free


def require_space(key: str, folder: Path, needed: float) -> None:
    """Check that the disk of a folder has `needed` bytes free.

    Args:
        key: the flag or the dotted config key that names the folder.

    Raises:
        UserError: it has less.
    """
    missing = missing_space(folder, needed)
    if missing > 0:
        problem = f"needs {_size(needed)}, and its disk has {_size(needed - missing)} free"
        raise UserError(key, folder, problem, f"free {_size(missing)} there, or set {key} to a folder on another disk")


def check_disk(folder: Path, parameters: int, optimizer_bytes: float) -> None:
    """Check that the first checkpoint and the adapter of a run fit on the disk.

    Args:
        parameters: those of the adapter.
        optimizer_bytes: bytes of optimizer state for each of them.

    Raises:
        UserError: they do not.
    """
    adapter = 4.0 * parameters + TOKENIZER_BYTES
    require_space("training.output_dir", folder, checkpoint_bytes(parameters, optimizer_bytes) + adapter)


def checkpoint_bytes(parameters: int, optimizer_bytes: float) -> float:
    """Return the size of a checkpoint: for each adapter parameter its fp32 value and `optimizer_bytes` of optimizer state."""
    return (4.0 + optimizer_bytes) * parameters + CHECKPOINT_EXTRA_BYTES


def _size(number: float) -> str:
    return f"{number / GIB:,.2f} GiB" if number >= GIB else f"{number / MIB:,.0f} MiB"


@contextmanager
def report_disk_errors(what: str, folder: Path, needed: float, remedy: str = "") -> Iterator[None]:
    """Turn the errors that writing raises on a full, read-only or broken disk into one line.

    Args:
        what: the thing that is written, as the subject of the sentence.
        needed: its size in bytes.
        remedy: what to do, at the end of the line.

    Raises:
        Failed: it cannot be written; names the reason and how much space is missing.
    """
    try:
        yield
    except Exception as error:
        if (reason := _disk_reason(error)) is None:
            raise
        missing = missing_space(folder, needed) / MIB
        space = f"; {missing:.1f} MiB of {needed / MIB:.1f} are missing" if missing > 0 else ""
        raise Failed(f"{what} cannot be written to {folder} ({reason}{space}){remedy and f'; {remedy}'}") from error


def _disk_reason(error: Exception) -> str | None:
    """Return why the disk refused something; None for an error that is not the disk's."""
    if isinstance(error, OSError):
        return str(error.strerror or error)
    if said := OS_ERROR.search(str(error)):
        return os.strerror(int(said[1]))
    # torch.save raises the message of its zip writer, which mentions positions in the file only.
    is_partial = isinstance(error, SafetensorError) or "inline_container.cc" in str(error)
    return "the disk accepted only a part of it" if is_partial else None


# Atomic writes: a process may be killed, or the power fail, between any two lines. Files are flushed to the disk before the
# rename that makes them visible, and the folder that holds them after it, because a file system may do the rename first.


@contextmanager
def staged_folder(place: Path, staging: Path, aside: Path | None = None) -> Iterator[Path]:
    """Give an empty folder to write into; move it to `place` by one rename if the block succeeds, remove it if not.

    Args:
        staging: the folder to write into, on the same file system as `place`.
        aside: where a folder at `place` waits for the rename, which cannot replace a folder with files; after a failure it
            returns to `place`. None keeps that folder and drops the staged one.
    """
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        flush_tree(staging)
        if aside and place.exists():
            aside.parent.mkdir(exist_ok=True)
            os.rename(place, aside)
        try:
            os.rename(staging, place)
        except OSError:
            if aside or not place.is_dir():
                raise
        flush(place.parent)
    finally:
        if aside and aside.exists() and not place.exists():
            os.rename(aside, place)
        for left in filter(None, (staging, aside)):
            shutil.rmtree(left, ignore_errors=True)


def flush_tree(folder: Path) -> None:
    """Make the disk store a folder with all that it holds."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            flush_tree(path)
        else:
            flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Make the disk store a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Replace a text file so that a reader finds the old text or the new one, also after a crash."""
    staged = path.with_name(f".{path.name}")
    staged.unlink(missing_ok=True)  # a link that someone put there is not followed
    staged.write_text(text, encoding="utf-8")
    flush(staged)
    os.replace(staged, path)
    flush(path.parent)


def remove(path: Path) -> bool:
    """Remove a file, a link (not what it leads to) or a folder; return whether there was one. What cannot be removed stays."""
    existed = os.path.lexists(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif existed:
        with suppress(OSError):
            path.unlink()
    return existed


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
