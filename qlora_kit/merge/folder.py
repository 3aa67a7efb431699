"""The merged model's folder: whether it may be written, how it takes its place, and its files besides the weights.

    .NAME.merging   is being written, locked by the process that writes it; becomes NAME by one rename
    .NAME.former    an earlier merge that was NAME, until the new one is in its place

A process may be killed, or the power fail, between any two lines: the next merge into NAME puts back or removes what was left.
"""

import fcntl
import glob
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_kit import wrapping
from qlora_kit.adapter.folder import AdapterSource
from qlora_kit.config import MIB
from qlora_kit.data.chat_template import find_stop_ids
from qlora_kit.errors import UserError, spell_out
from qlora_kit.output.folder import CHECKPOINT_PREFIX, check_writable, flush, replace_text, report_disk_errors
from qlora_kit.output.provenance import now, versions
from qlora_kit.secrets import redact
from qlora_kit.untrusted import read_json, user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
Base = Literal["original", "dequantized"]  # the weights that the update is added to


def check_output(name: str, overwrite: bool, source: AdapterSource) -> Path:
    """Return the output folder if a merge may be written there; create and remove nothing.

    Raises:
        UserError: it is no place for a model, is not empty, cannot be written, or holds a file that the merge reads.
    """
    folder = user_path(name, KEY).resolve()
    if problem := _why_no_place(folder, source):
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
        if any(above.glob(f"{CHECKPOINT_PREFIX}*/manifest.json")):
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
            if any(staging.iterdir()):
                say(f"Removing what a killed merge left in {staging}")
                for path in staging.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            _put_right(folder)
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


def _put_right(folder: Path) -> None:
    """Put back, or finish removing, the earlier merge that a killed one had set aside."""
    former = _beside(folder, FORMER)
    if not former.is_dir():
        return
    if _is_merge(folder):
        say(f"Removing {former}, which a killed merge left after it was done")
        _drop(former, folder)
    else:
        say(f"Putting back {folder}, which a killed merge had set aside")
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


def say(text: str) -> None:
    """Print lines for the user, without secrets and control characters."""
    wrapping.say("\n".join(spell_out(redact(line)) for line in text.split("\n")))


def write_small_files(
    folder: Path, base: Path, source: AdapterSource, tokenizer: "PreTrainedTokenizerBase", onto: Base, matrices: int
) -> None:
    """Write the base model's config and code, the adapter's tokenizer and chat template, generation config and merge.json.

    Args:
        base: the base model's folder.
        matrices: number of matrices that were changed.
    """
    for path in [base / "config.json", *(base.glob("*.py") if source.model.trust_remote_code else ())]:
        shutil.copyfile(path, folder / path.name)
    tokenizer.save_pretrained(folder)
    _write_json(folder / "generation_config.json", _generation_config(base, source, tokenizer))
    described = {
        "adapter": redact(str(source.folder.resolve())),
        "base_model": source.model.model_dump() | {"name": redact(source.model.name)},
        "onto": onto,
        "quantization": source.quantization.model_dump() if onto == "dequantized" else None,
        "matrices": matrices,
        "check": None,
        "versions": versions(),
        "command": redact(shlex.join(["python", *sys.orig_argv[1:]])),
        "finished": now(),
        "files": sorted([MERGE_FILE, *(path.name for path in folder.iterdir())]),
    }
    _write_json(folder / MERGE_FILE, described)


def _generation_config(base: Path, source: AdapterSource, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return the base model's generation config with the tokens that end the adapter's answers."""
    if (base / "generation_config.json").is_file():
        generation = read_json(base / "generation_config.json", "model.name")
    else:
        settings = read_json(base / "config.json", "model.name")
        known = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {key: settings[key] for key in known if settings.get(key) is not None}
    if ids := merge_stop_ids(generation.get("eos_token_id"), source, tokenizer):
        generation["eos_token_id"] = ids
    if tokenizer.pad_token_id is not None:
        generation["pad_token_id"] = tokenizer.pad_token_id
    return generation


def merge_stop_ids(known: Any, source: AdapterSource, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids that end an answer: the base model's, and those that the adapter was trained to end with.

    Args:
        known: eos_token_id of the base model's generation config: a number, a list of them, or None.

    Raises:
        UserError: it is something else.
    """
    stated = known if isinstance(known, list) else [] if known is None else [known]
    if wrong := [number for number in stated if type(number) is not int or not 0 <= number < 2**31]:
        problem = f"has the eos_token_id {str(wrong[0])[:40]} in its generation config"
        raise UserError("model.name", source.model.name, problem, "correct it, or copy the model again")
    own = find_stop_ids(tokenizer, source.style) if source.stop_ids is None else source.stop_ids
    return list(dict.fromkeys([*stated, *own]))


def record_check(output: Path, check: dict[str, Any]) -> None:
    """Write the result of the check into merge.json."""
    described = read_json(output / MERGE_FILE, "--output")
    _write_json(output / MERGE_FILE, described | {"check": check})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    replace_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
