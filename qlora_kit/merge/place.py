"""Where a merge goes: whether it may be written there, and how it takes its place.

    .NAME.merging   is being written, locked by the process that writes it; becomes NAME by one rename
    .NAME.former    an earlier merge that was NAME, until the new one is in its place

A process may be killed, or the power fail, between any two lines: the next merge into NAME puts back or removes what was left.
"""

import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatch
from pathlib import Path

from psutil import pid_exists

from qlora_kit.adapter.folder import AdapterSource
from qlora_kit.config import MIB
from qlora_kit.errors import UserError, spell_out
from qlora_kit.output.folder import check_writable, flush, report_disk_errors
from qlora_kit.output.lock import PROCESS_NUMBER
from qlora_kit.output.place import holds_checkpoints
from qlora_kit.secrets import redact
from qlora_kit.untrusted import read_json, user_path
from qlora_kit.wrapping import say

KEY = "--output"
MERGE_FILE = "merge.json"  # marks a folder as a merge, and says of what
OF_A_MERGE = {"adapter", "base_model", "onto"}  # keys of every merge.json
# The files of a merge whose merge.json does not list them.
KNOWN = (
    MERGE_FILE, "config.json", "generation_config.json", "model*.safetensors", "*.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
    "chat_template.jinja", "additional_chat_templates",
)  # fmt: skip
MERGING, FORMER = "merging", "former"
LONGEST_NAME = 255  # bytes, of most file systems
SMALL_FILES_BYTES = 64 * MIB  # room for config and tokenizer: Qwen2.5's takes 11 MiB


def check_output(name: str, overwrite: bool, source: AdapterSource) -> Path:
    """Return the output folder if a merge may be written there; create and remove nothing.

    Raises:
        UserError: it is no place for a model, is not empty, cannot be written, or holds a file that the merge reads.
    """
    path = user_path(name, KEY)
    folder = path.resolve()
    dangling = "is a link that leads nowhere" if path.is_symlink() and not path.exists() else None
    if problem := dangling or _why_no_place(folder, source):
        raise UserError(KEY, name, problem, "use another --output")
    for path in (folder, folder.parent):  # beside it lies the folder that becomes it
        check_writable(path, KEY, name, KEY)
    _check_content(folder, name, overwrite)
    return folder


def _why_no_place(folder: Path, source: AdapterSource) -> str | None:
    """Return why a folder, with all links resolved, must not become a merge, or None."""
    if not folder.name:
        return "is the root of the file system"
    if spell_out(str(folder)).encode(errors="replace").decode() != str(folder):
        return "is not named in UTF-8, or has control characters in its name"
    if len(os.fsencode(_beside(folder, MERGING).name)) > LONGEST_NAME:
        return "has too long a name"
    for above in (folder, *folder.parents):
        if holds_checkpoints(above):
            return f"lies in {above}, which holds the checkpoints of a run"
    data = source.config.data.names
    for name in (str(source.folder), source.model.name, *data):
        used = Path(os.path.realpath(os.path.expanduser(name)))
        if os.path.exists(used) and used.is_relative_to(folder):
            return f"holds {name}, which the merge reads"
        if os.path.isdir(used) and folder.is_relative_to(used) and name in data:
            return f"lies in {name}, the data of the adapter's run"
    return None


def _check_content(folder: Path, name: str, overwrite: bool) -> None:
    """Check that a folder is new, empty, or a merge that may be replaced; raises UserError if not."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not _is_merge(folder):
        raise UserError(KEY, name, "is not empty", "use a new folder")
    if not overwrite:
        raise UserError(KEY, name, "holds a merged model", "replace it with --overwrite, or use another --output")


def _is_merge(folder: Path) -> bool:
    try:
        return read_json(folder / MERGE_FILE, KEY).keys() >= OF_A_MERGE
    except UserError:
        return False


def _beside(folder: Path, use: str) -> Path:
    return folder.with_name(f".{folder.name}.{use}")


def disk_errors(folder: Path, nbytes: int) -> AbstractContextManager[None]:
    """Turn what a full or broken disk raises into Failed.

    Args:
        nbytes: bytes of the weights.
    """
    return report_disk_errors("the merged model", folder, nbytes + SMALL_FILES_BYTES)


@contextmanager
def open_output(folder: Path, overwrite: bool, nbytes: int) -> Iterator[Path]:
    """Give an empty folder beside `folder` to write a merge into, and keep other merges out of both while the block runs.

    What a killed merge left is put back or removed first. The folder is removed at the end, unless it was put in its place.

    Raises:
        UserError: another merge is at work there, or has ended there in the meantime.
        Failed: the disk refuses.
    """
    staging = _beside(folder, MERGING)
    with disk_errors(folder, nbytes):
        folder.parent.mkdir(parents=True, exist_ok=True)
        handles = [_make_and_lock(staging, folder)]
    try:
        with disk_errors(folder, nbytes):
            if folder.is_dir():
                handles.append(_open_folder(folder))
                if _lock(handles[-1]) is False:
                    raise _in_use(folder)
            _empty(staging)
            for left in _of_killed_processes(folder, MERGING):
                _empty(left)
                left.rmdir()
            for path in (_beside(folder, FORMER), *_of_killed_processes(folder, FORMER)):
                _put_right(path, folder)
            _check_content(folder, str(folder), overwrite)
        yield staging
    finally:
        if _is_open(staging, handles[0]):
            shutil.rmtree(staging, ignore_errors=True)
        for handle in handles:
            os.close(handle)


def _make_and_lock(staging: Path, folder: Path) -> int:
    """Make the folder to write into, unless a killed merge left it, and lock it; return the handle that holds the lock."""
    while True:
        try:
            staging.mkdir()
            is_new = True
        except FileExistsError:
            is_new = False
        handle = _open_folder(staging)
        is_locked = _lock(handle)
        if is_locked is False or not (is_locked or is_new):
            os.close(handle)
            raise _in_use(folder, "" if is_locked is False else f", or remove {staging}, if no merge is at work")
        if _is_open(staging, handle):
            return handle
        os.close(handle)  # its holder put it in its place between our two lines


def _open_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _lock(handle: int) -> bool | None:
    """Lock an open folder until it is closed; return whether that worked, or None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _is_open(path: Path, handle: int) -> bool:
    return path.is_dir() and os.path.samestat(path.stat(), os.fstat(handle))


def _in_use(folder: Path, more: str = "") -> UserError:
    return UserError(KEY, folder, "is in use by another merge", f"wait for its end, or use another --output{more}")


def put_in_place(staging: Path, folder: Path) -> None:
    """Let a complete merge take its place; of an earlier one there, remove its own files and keep all others."""
    for path in sorted(staging.rglob("*"), reverse=True):
        flush(path)
    flush(staging)
    former = _beside(folder, FORMER)
    if _is_merge(folder):
        os.rename(folder, former)
    try:
        os.rename(staging, folder)
    finally:
        if former.exists() and not folder.exists():
            os.rename(former, folder)
    flush(folder.parent)
    if former.exists():
        _drop(former, folder)


def _of_killed_processes(folder: Path, use: str) -> list[Path]:
    """Return what killed merges of an earlier version left, which put the number of their process behind the name."""
    found = folder.parent.glob(f"{glob.escape(_beside(folder, use).name)}-*")
    numbers = {path: path.name.rpartition("-")[2] for path in found if path.is_dir()}
    return [path for path, number in numbers.items() if PROCESS_NUMBER.fullmatch(number) and not pid_exists(int(number))]


def _empty(left: Path) -> None:
    """Remove what a killed merge wrote."""
    paths = list(left.iterdir())
    if paths:
        say(redact(f"Removing what a killed merge left in {left}"))
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _put_right(former: Path, folder: Path) -> None:
    """Put back, or finish removing, the earlier merge that a killed one had set aside."""
    if not former.is_dir():
        return
    if _is_merge(folder):
        say(redact(f"Removing {former}, which a killed merge left after it was done"))
        _drop(former, folder)
    else:
        say(redact(f"Putting back {folder}, which a killed merge had set aside"))
        os.rename(former, folder)  # fails, and changes nothing, if the folder has other files


def _drop(former: Path, folder: Path) -> None:
    """Move all but a former merge's own files into `folder`, and remove the rest; merge.json goes first after the moves."""
    if (former / MERGE_FILE).exists():
        own = _own_files(former)
        for path in sorted(former.iterdir()):
            if not any(fnmatch(path.name, name) for name in own) and not os.path.lexists(folder / path.name):
                os.rename(path, folder / path.name)
        (former / MERGE_FILE).unlink()
    shutil.rmtree(former)


def _own_files(folder: Path) -> list[str]:
    """Return the names of the files that a merge wrote, as its merge.json lists them, or patterns of them."""
    try:
        listed = read_json(folder / MERGE_FILE, KEY).get("files")
    except UserError:
        listed = None
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        return list(KNOWN)
    return [*map(glob.escape, listed), f".{MERGE_FILE}"]
