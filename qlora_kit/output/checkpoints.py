"""Checkpoints: complete and verified, or absent.

    checkpoints/checkpoint-N/             the files of step N, and manifest.json: the size and SHA-256 of each of them
    checkpoints/.saving/checkpoint-N/     is being written; becomes checkpoint-N by one rename
    checkpoints/.replaced/checkpoint-N/   an earlier checkpoint of that step, until the rename is done
    checkpoints/.removed/checkpoint-N/    is being deleted

The Trainer names a checkpoint's folder checkpoint-N, so that the folder to write into has that name as well. A process may be
killed, or the power fail, at any point: earlier checkpoints stay valid (see `staged_folder`). Imports no torch.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qlora_kit.errors import CONTROL, Failed
from qlora_kit.output.folder import (
    CHECKPOINT_PREFIX,
    REMOVED,
    REPLACED,
    SAVING,
    digest,
    missing_space,
    remove,
    report_disk_errors,
    staged_folder,
)
from qlora_kit.untrusted import parse_json, read_regular_file

MANIFEST = "manifest.json"


class InvalidCheckpoint(Exception):
    """The reason why a run cannot be resumed from a folder."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint's manifest.

    Attributes:
        number: counts checkpoints in the order of writing. A run resumed from an earlier step writes lower steps later.
        run: JSON that the run added when it saved.
        files: name -> {"bytes": size, "sha256": digest}.
    """

    folder: Path
    step: int
    number: int
    run: dict[str, Any]
    files: dict[str, dict[str, Any]]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest and check it against its own hash; the other files are not read.

    Raises:
        InvalidCheckpoint: it is missing or damaged, or states what no run writes.
    """
    try:
        content = parse_json(read_regular_file(folder / MANIFEST))
        sealed = content.pop("sha256")
        if sealed != _digest_of(content):
            raise ValueError
        checkpoint = Checkpoint(folder, content["step"], content["number"], content["run"], content["files"])
    except FileNotFoundError:
        raise InvalidCheckpoint(f"has no {MANIFEST}, which is written last") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InvalidCheckpoint(f"{MANIFEST} is damaged") from None
    if problem := _why_not_of_a_run(checkpoint):
        raise InvalidCheckpoint(f"{MANIFEST} {problem}")
    return checkpoint


def _why_not_of_a_run(checkpoint: Checkpoint) -> str | None:
    """Return what a manifest states that no run writes, or None. Anyone can seal one."""
    if any(type(number) is not int or not 0 <= number < 2**53 for number in (checkpoint.step, checkpoint.number)):
        return "has a step or a number that is no whole number"
    if not isinstance(checkpoint.run, dict) or not isinstance(checkpoint.files, dict) or not checkpoint.files:
        return "lists no files, or says nothing of the run"
    if not isinstance(checkpoint.run.get("eval_loss"), int | float | None):
        return "has an eval_loss that is no number"
    for name, stated in checkpoint.files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or CONTROL.search(name):
            return "lists a file outside the checkpoint"
        if not (isinstance(stated, dict) and isinstance(stated.get("bytes"), int) and isinstance(stated.get("sha256"), str)):
            return "lists a file without its size and its SHA-256"
    return None


def verify(checkpoint: Checkpoint) -> None:
    """Check the size and the hash of every file.

    Raises:
        InvalidCheckpoint: a file is missing, cannot be read, was changed, or is a link or a device.
    """
    for name, expected in checkpoint.files.items():
        path = checkpoint.folder / name
        try:
            found = path.lstat()
            inside = path.resolve().is_relative_to(checkpoint.folder.resolve())
            if not stat.S_ISREG(found.st_mode) or not inside:
                raise InvalidCheckpoint(f"{name} is no regular file of it")
            if found.st_size != expected["bytes"]:
                raise InvalidCheckpoint(f"{name} has {found.st_size:,} bytes instead of {expected['bytes']:,}")
            if digest(path) != expected["sha256"]:
                raise InvalidCheckpoint(f"{name} was changed after it was written (its SHA-256 differs)")
        except FileNotFoundError:
            raise InvalidCheckpoint(f"{name} is missing") from None
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidCheckpoint(f"{name} cannot be read ({getattr(error, 'strerror', None) or error})") from None


def list_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoint folders in `root`, valid or not."""
    return sorted(path for path in root.glob(f"{CHECKPOINT_PREFIX}*") if path.is_dir())


def find_newest_valid(
    folders: list[Path], check: Callable[[Checkpoint], None] | None = None
) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """Find the valid checkpoint that was written last.

    Args:
        check: raises InvalidCheckpoint for a reason of the caller's.

    Returns:
        It, or None; and folder and reason of each invalid checkpoint that would have been preferred.
    """
    read, invalid = _read_all(folders)
    for checkpoint in reversed(read):
        try:
            verify(checkpoint)
            if check:
                check(checkpoint)
            return checkpoint, invalid
        except InvalidCheckpoint as reason:
            invalid.append((checkpoint.folder, str(reason)))
    return None, invalid


def describe_resume_point(root: Path) -> str:
    """Say which checkpoint a run that ends now can be resumed from."""
    newest, _ = find_newest_valid(list_checkpoints(root))
    if newest is None:
        return "there is no earlier checkpoint, start again with --overwrite"
    return f"{newest.folder.name} is complete, continue from it with --resume"


def newest_step(root: Path) -> int | None:
    """Return the step of the checkpoint that was written last, as its manifest says; its files are not read."""
    read, _ = _read_all(list_checkpoints(root))
    return read[-1].step if read else None


@contextmanager
def staged_checkpoint(root: Path, step: int, run: dict[str, Any], needed: float) -> Iterator[Path]:
    """Give a folder to write the checkpoint of `step` into; make it checkpoint-N in `root` if the block succeeds.

    Args:
        run: JSON to add to the manifest.
        needed: bytes that the checkpoint takes.

    Raises:
        Failed: there is no space, or the disk cannot be written; earlier checkpoints stay.
    """
    staging, place, aside = (folder / f"{CHECKPOINT_PREFIX}{step}" for folder in (root / SAVING, root, root / REPLACED))
    try:
        with report_disk_errors(f"the checkpoint of step {step}", root, needed):
            if missing_space(root, needed) > 0:
                raise OSError(errno.ENOSPC, "the disk is too full")
            with staged_folder(place, staging, aside) as folder:
                yield folder
                earlier, _ = _read_all(list_checkpoints(root))
                _write_manifest(folder, {"step": step, "number": earlier[-1].number + 1 if earlier else 1, "run": run})
    except Failed as failure:
        raise Failed(f"{failure}; {describe_resume_point(root)}") from failure
    finally:
        for name in (SAVING, REPLACED):
            with suppress(OSError):  # it does not exist
                (root / name).rmdir()


def clean(root: Path) -> list[Path]:
    """Remove what a killed run left half-done, and put a replaced checkpoint back if its successor is missing.

    Returns:
        What was removed.
    """
    for aside in list_checkpoints(root / REPLACED):
        if not (root / aside.name).exists():
            os.rename(aside, root / aside.name)
    return [root / name for name in (SAVING, REPLACED, REMOVED) if remove(root / name)]


def rotate(root: Path, limit: int | None, *protected: Path) -> None:
    """Keep the newest checkpoint, the one with the best evaluation, and the newest of the others, `limit` in all.

    Call it right after a checkpoint was written: the newest one is then valid, and invalid ones may be deleted.

    Args:
        limit: 1 still keeps the best checkpoint next to the newest; None keeps all.
        protected: never deleted, such as the checkpoint that early stopping would restore.
    """
    if limit is None:
        return
    by_age = _read_all(list_checkpoints(root))[0][::-1]
    evaluated = [one for one in by_age if one.run.get("eval_loss") is not None]
    best = min(evaluated, key=lambda one: one.run["eval_loss"], default=None)
    kept = [one for one in by_age if one is by_age[0] or one is best or one.folder in protected]
    kept += [one for one in by_age if one not in kept][: max(0, limit - len(kept))]
    for folder in set(list_checkpoints(root)) - {one.folder for one in kept}:
        (root / REMOVED).mkdir(exist_ok=True)
        os.rename(folder, root / REMOVED / folder.name)  # a half-deleted folder must not look like a checkpoint
    remove(root / REMOVED)


def _read_all(folders: list[Path]) -> tuple[list[Checkpoint], list[tuple[Path, str]]]:
    """Return the checkpoints whose manifest is valid, in the order of writing; and the other folders, each with the reason."""
    read, invalid = [], []
    for folder in folders:
        try:
            read.append(read_checkpoint(folder))
        except InvalidCheckpoint as reason:
            invalid.append((folder, str(reason)))
    return sorted(read, key=lambda one: one.number), invalid


def _write_manifest(folder: Path, content: dict[str, Any]) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)} for path in paths}
    content = content | {"files": files}
    text = json.dumps(content | {"sha256": _digest_of(content)}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
