"""Which folder may become a run's: one that can be written, holds no other run, and is nothing that the run reads."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qlora_kit.errors import UserError
from qlora_kit.output.folder import (
    ADAPTER_FILES,
    CHECKPOINT_PREFIX,
    CHECKPOINTS,
    LOG,
    NEW,
    OUTPUT_FILES,
    REMOVED,
    REPLACED,
    SAVING,
    check_writable,
)
from qlora_kit.untrusted import user_path

KEY, FLAG = "training.output_dir", "--output_dir"
MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.index.json")  # beside a config.json


def check_output_dir(name: str, overwrite: bool, resume: bool, inputs: Sequence[str] = ()) -> Path:
    """Return the output folder if a run may write there; what it creates to find out, it removes.

    Args:
        inputs: the local files and folders that the run reads: base model, data.

    Raises:
        UserError: it cannot be written, is no place for a run, or holds a run and neither `overwrite` nor `resume` is set.
    """
    folder = check_place(name, KEY, FLAG)
    if problem := _why_no_place(folder.resolve(), inputs) or _why_not_usable(folder, overwrite and not resume):
        raise UserError(KEY, name, problem, f"use another {FLAG}")
    if not resume and not overwrite and (held := _describe_run(folder)):
        content, ways = held
        raise UserError(KEY, name, f"already holds {content}", f"{ways} with --overwrite, or use another {FLAG}")
    return folder


def _describe_run(folder: Path) -> tuple[str, str] | None:
    """Say which run a folder holds, and what can be done with it; None if it holds none."""
    if has_begun(folder / NEW):
        return f"a run, and in {NEW} the unfinished one that replaces it", "continue that with --resume, start it anew"
    if (folder / ADAPTER_FILES[0]).exists():
        return "a finished adapter", "continue it with --resume, replace it"
    if _has_checkpoints(folder):
        return "an unfinished run", "continue it with --resume, replace it"
    if has_begun(folder):
        return f"the {LOG} of a run that ended before its first checkpoint", "replace it"
    return None


def holds_run(folder: Path) -> bool:
    """Return whether a folder holds a run, finished or not, or what one left that died early."""
    return _describe_run(folder) is not None


def has_begun(folder: Path) -> bool:
    """Return whether a run has written its log or a checkpoint into a folder."""
    return os.path.isfile(folder / LOG) or _has_checkpoints(folder)  # isfile raises nothing


def _has_checkpoints(folder: Path) -> bool:
    """Return whether a folder has checkpoints, valid or not, or one that was being replaced."""
    return any(any((folder / CHECKPOINTS).glob(f"{parent}{CHECKPOINT_PREFIX}*")) for parent in ("", f"{REPLACED}/"))


def holds_checkpoints(folder: Path) -> bool:
    """Return whether a folder is one of a run's checkpoints, such as `checkpoints` of an output folder."""
    return any(folder.glob(f"{CHECKPOINT_PREFIX}*/manifest.json"))


def _why_no_place(folder: Path, inputs: Sequence[str]) -> str | None:
    """Return why a folder, with all links resolved, must not be a run's, or None."""
    if folder == Path(folder.anchor):
        return "is the root of the file system"
    for above in (folder, *folder.parents):
        if above.name in (NEW, SAVING, REPLACED, REMOVED) or holds_checkpoints(above):
            return f"lies in {above}, which holds checkpoints of a run"
        if (above / "manifest.json").is_file() and above.name.startswith(CHECKPOINT_PREFIX):
            return f"lies in {above}, a checkpoint of a run"
    if (folder / "config.json").is_file() and any(any(folder.glob(pattern)) for pattern in MODEL_WEIGHTS):
        return "holds a whole model, whose tokenizer would be replaced"
    for name in inputs:
        path = Path(name).expanduser().resolve()
        if path.is_dir() and path in (folder, *folder.parents):
            return f"is or lies in {name}, which the run reads"
        if (path.parent == folder and path.name in OUTPUT_FILES) or {folder / CHECKPOINTS, folder / NEW} & set(path.parents):
            return f"would replace {name}, which the run reads"
    return None


def _why_not_usable(folder: Path, overwrite: bool) -> str | None:
    """Return which entry of a folder keeps a run from writing there, or None."""
    for name in OUTPUT_FILES:
        if (folder / name).is_dir():
            return f"holds a folder where the file {name} is to be"
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_symlink() and overwrite:
        return f"has its {CHECKPOINTS} behind a link, which --overwrite does not follow"
    if os.path.lexists(checkpoints) and not checkpoints.is_dir():
        return f"holds something else where the folder {CHECKPOINTS} is to be"
    for path in (checkpoints, folder / NEW):
        if path.is_dir() and (reason := _why_not_writable(path)):
            return f"cannot be used: its folder {path.name} cannot be written ({reason})"
    return None


def check_place(name: str, key: str, flag: str) -> Path:
    """Return the folder of a name, which may not exist yet, if it can be written; what it creates to find out, it removes.

    Args:
        key: what names the folder.
        flag: what names another one.

    Raises:
        UserError: it cannot.
    """
    folder = user_path(name, key)
    check_writable(folder, key, name, flag)
    dangling = any(path.is_symlink() and not path.exists() for path in (folder, *folder.parents))
    reason = "a link that leads nowhere" if dangling else _why_not_writable(folder)
    if reason:
        raise UserError(key, name, f"cannot be used as a folder ({reason})", f"use another {flag}")
    return folder


def _why_not_writable(folder: Path) -> str | None:
    """Make a folder and a file in it, and remove what was made: permissions alone do not tell whether a disk takes both."""
    missing = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror
    finally:
        for path in missing:
            with suppress(OSError):  # it was not made, or another process has put something into it
                path.rmdir()
