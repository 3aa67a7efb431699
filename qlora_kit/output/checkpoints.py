"""Checkpoints on disk: each is whole and verified, or it is not there.

    checkpoints/checkpoint-N/   files of step N, and manifest.json, written last: size and SHA-256 of every one of them
    checkpoints/.saving-N/      is being written; becomes checkpoint-N by one rename
    checkpoints/.replaced-N/    stood where a checkpoint of the same step is put in this moment
    checkpoints/.removed-N/     is being deleted

A process may be killed, or the power fail, between any two lines of this file: a checkpoint that stood before still stands. Files
are flushed to disk before the rename, and the folder that holds them after it, since a file system may do the rename first.
Imports no torch.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.config import MIB
from qlora_kit.errors import Failed

MANIFEST = "manifest.json"
PREFIX, SAVING, REPLACED, REMOVED = "checkpoint-", ".saving-", ".replaced-", ".removed-"
BESIDE = MIB  # of a checkpoint's bytes: headers, states of the loop and of random numbers, the log so far


class Invalid(Exception):
    """Why a folder is no checkpoint to go on from."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint by its manifest; `run` is what the run said of itself when it saved."""

    folder: Path
    step: int
    number: int  # in the order of writing: after going on from an earlier step, the newest is not that of the highest step
    run: dict[str, Any]
    files: dict[str, dict[str, Any]]  # name -> bytes, sha256


# --- reading ------------------------------------------------------------------------------------------------------------


def read_checkpoint(folder: Path) -> Checkpoint:
    """What stands in a checkpoint's manifest, which is checked against itself; the other files are not looked at.

    Raises:
        Invalid: it is missing or damaged.
    """
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        sealed = content.pop("sha256")
        if sealed != _digest_of(content):
            raise ValueError
        return Checkpoint(folder, content["step"], content["number"], content["run"], content["files"])
    except FileNotFoundError:
        raise Invalid(f"has no {MANIFEST}, which is written last") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Invalid(f"{MANIFEST} is damaged") from None


def verify(checkpoint: Checkpoint) -> None:
    """Hold every file to its size and hash.

    Raises:
        Invalid: one is missing, cannot be read, or is not what was written.
    """
    for name, expected in checkpoint.files.items():
        path = checkpoint.folder / name
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise Invalid(f"{name} holds {size:,} bytes of {expected['bytes']:,}")
            if _digest(path) != expected["sha256"]:
                raise Invalid(f"{name} is not what was written (its SHA-256 differs)")
        except FileNotFoundError:
            raise Invalid(f"{name} is missing") from None
        except OSError as error:
            raise Invalid(f"{name} cannot be read ({error.strerror})") from None


def candidates(root: Path) -> list[Path]:
    return sorted(path for path in root.glob(f"{PREFIX}*") if path.is_dir())


def newest_valid(folders: list[Path]) -> tuple[Checkpoint | None, list[str]]:
    """The valid checkpoint that was written last, and a line for each that would have come before it and is not valid."""
    read, passed_over = [], []
    for folder in folders:
        try:
            read.append(read_checkpoint(folder))
        except Invalid as reason:
            passed_over.append(f"{folder}: {reason}")
    for checkpoint in sorted(read, key=lambda one: one.number, reverse=True):
        try:
            verify(checkpoint)
            return checkpoint, passed_over
        except Invalid as reason:
            passed_over.append(f"{checkpoint.folder}: {reason}")
    return None, passed_over


# --- writing ------------------------------------------------------------------------------------------------------------


@contextmanager
def saving(root: Path, step: int, run: dict[str, Any], needed: float) -> Iterator[Path]:
    """A folder to write the checkpoint of `step` into; it stands as checkpoints/checkpoint-N when the block has ended well.

    Args:
        run: what the manifest is to say of the run, as JSON.
        needed: bytes that the checkpoint will take.

    Raises:
        Failed: there is no room, or the disk refuses; what stood before still stands.
    """
    staging, place = root / f"{SAVING}{step}", root / f"{PREFIX}{step}"
    try:
        with refused_by_the_disk(f"the checkpoint of step {step}", root, needed), _as_if_not_begun(root):
            check_room(root, needed)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            yield staging
            number = 1 + max((one.number for one in _readable(root)), default=0)
            _seal(staging, {"step": step, "number": number, "run": run})
            _put(staging, place)
    except Failed as failure:
        raise Failed(f"{failure}; {what_stands(root)}") from failure


def what_stands(root: Path) -> str:
    """What a run that ends here leaves to go on from, in words."""
    before, _ = newest_valid(candidates(root))
    return f"{before.folder.name} stands, go on from it with --resume" if before else "no checkpoint was written before it"


@contextmanager
def _as_if_not_begun(root: Path) -> Iterator[None]:
    try:
        yield
    except Exception:
        clean(root)  # also gives its room back
        raise


def _seal(folder: Path, content: dict[str, Any]) -> None:
    """Flush what was written, and write the manifest after it."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        flush(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    content = content | {"files": files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(content | {"sha256": _digest_of(content)}, indent=1) + "\n", encoding="utf-8")
    flush(manifest)
    flush(folder)


def _put(staging: Path, place: Path) -> None:
    """By one rename; a folder cannot take the place of one that holds files, so an earlier one of that step steps aside."""
    aside = place.with_name(place.name.replace(PREFIX, REPLACED))
    if place.exists():
        os.rename(place, aside)
    os.rename(staging, place)
    flush(place.parent)
    shutil.rmtree(aside, ignore_errors=True)


def clean(root: Path) -> None:
    """Remove what a killed run left half-done; a checkpoint that had stepped aside for one that never came goes back."""
    for aside in root.glob(f"{REPLACED}*"):
        place = aside.with_name(aside.name.replace(REPLACED, PREFIX))
        if not place.exists():
            os.rename(aside, place)
    for name in (SAVING, REPLACED, REMOVED):
        for left in root.glob(f"{name}*"):
            shutil.rmtree(left, ignore_errors=True)


def rotate(root: Path, limit: int | None, needed: Path | None = None) -> None:
    """Keep the newest, the one with the best evaluation, and of the others the newest, `limit` in all; None keeps all.

    To be called when a checkpoint was just written: the newest is then valid, and others, valid or not, may go. With a limit of 1
    the best still stays beside the newest.

    Args:
        needed: stays in any case: what early stopping would go back to.
    """
    if limit is None:
        return
    by_age = sorted(_readable(root), key=lambda one: one.number, reverse=True)
    evaluated = [one for one in by_age if one.run.get("eval_loss") is not None]
    best = min(evaluated, key=lambda one: one.run["eval_loss"], default=None)
    kept = [one for one in by_age if one is by_age[0] or one is best or one.folder == needed]
    kept += [one for one in by_age if one not in kept][: max(0, limit - len(kept))]
    for folder in set(candidates(root)) - {one.folder for one in kept}:
        gone = folder.with_name(folder.name.replace(PREFIX, REMOVED))
        os.rename(folder, gone)  # so that a half-deleted one is never met as a checkpoint
        shutil.rmtree(gone, ignore_errors=True)


def flush(path: Path) -> None:
    """Have the disk itself hold a file, or the names in a folder."""
    if path.is_dir() and os.name == "nt":
        return  # cannot be opened there
    handle = os.open(path, os.O_RDWR if path.is_file() and os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader, also after a crash, meets the old text or the new one."""
    staged = path.with_name(f".{path.name}")
    staged.write_text(text, encoding="utf-8")
    flush(staged)
    os.replace(staged, path)


# --- room on the disk ---------------------------------------------------------------------------------------------------


def checkpoint_bytes(parameters: int, optimizer_bytes: float) -> float:
    """Return the size of a checkpoint: of each adapter parameter its fp32 value and `optimizer_bytes` of optimizer state."""
    return (4.0 + optimizer_bytes) * parameters + BESIDE


def missing_bytes(folder: Path, needed: float) -> float:
    """How much more than what is free where `folder` is, or will be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return needed - shutil.disk_usage(there).free


def check_room(folder: Path, needed: float) -> None:
    """
    Raises:
        OSError: ENOSPC, before anything is written, when less than `needed` bytes are free.
    """
    if missing_bytes(folder, needed) > 0:
        raise OSError(errno.ENOSPC, "the disk is too full")


@contextmanager
def refused_by_the_disk(what: str, folder: Path, needed: float) -> Iterator[None]:
    """Turn what writing raises on a full, read-only or broken disk into one line.

    Raises:
        Failed: what could not be written, why, and how much room is missing.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save raises what its zip writer says, which speaks of positions in the file.
        if isinstance(error, RuntimeError) and "inline_container.cc" not in str(error):
            raise
        reason = error.strerror if isinstance(error, OSError) else "the disk took only a part of it"
        missing = missing_bytes(folder, needed) / MIB
        room = f"; {missing:.1f} MiB of {needed / MIB:.1f} are missing" if missing > 0 else ""
        raise Failed(f"{what} cannot be written to {folder} ({reason}{room})") from error


# --- beneath ------------------------------------------------------------------------------------------------------------


def _readable(root: Path) -> list[Checkpoint]:
    found = []
    for folder in candidates(root):
        with suppress(Invalid):
            found.append(read_checkpoint(folder))
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
