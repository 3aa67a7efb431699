"""The merged model's folder: whether it may be written, its atomic writing, and its files besides the weights."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_kit.adapter.folder import AdapterSource
from qlora_kit.config import MIB
from qlora_kit.data.chat_template import find_stop_ids
from qlora_kit.errors import UserError
from qlora_kit.model.hub import read_json
from qlora_kit.output.folder import check_writable, replace_text, report_disk_errors, staged_folder
from qlora_kit.output.provenance import now, versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.merge.check import Comparison

MERGE_FILE = "merge.json"  # marks a folder as a merge, and says of what
SMALL_FILES_BYTES = 64 * MIB  # room for config and tokenizer: Qwen2.5's takes 11 MiB
Base = Literal["original", "dequantized"]  # the weights that the update is added to


def check_output(name: str, overwrite: bool, source: AdapterSource) -> Path:
    """Return the output folder if a merge may be written there; create and remove nothing.

    Raises:
        UserError: it is not empty, cannot be written, or holds a file that the merge reads.
    """
    folder, key = Path(name).expanduser().resolve(), "--output"
    for path in (folder, folder.parent):  # beside it lies the folder that becomes it
        check_writable(path, key, name, "--output")
    for used in (source.folder, Path(source.model.name).expanduser()):
        if used.exists() and used.resolve().is_relative_to(folder):
            raise UserError(key, name, f"holds {used}, which the merge reads", "use another --output")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MERGE_FILE).is_file():
            raise UserError(key, name, "is not empty", "use a new folder")
        if not overwrite:
            raise UserError(key, name, "holds a merged model", "replace it with --overwrite, or use another --output")
    return folder


@contextmanager
def staged_merge(output: Path, nbytes: int) -> Iterator[Path]:
    """Give a folder to write into, which takes the place of `output` if the block succeeds, and is removed if not.

    Args:
        nbytes: bytes of the weights.

    Raises:
        Failed: the disk is full or broken.
    """
    staging, aside = (output.with_name(f".{output.name}.{use}-{os.getpid()}") for use in ("merging", "former"))
    disk_errors = report_disk_errors("the merged model", output, nbytes + SMALL_FILES_BYTES)
    with disk_errors, staged_folder(output, staging, aside) as folder:
        yield folder


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
        "adapter": str(source.folder.resolve()),
        "base_model": source.model.model_dump(),
        "onto": onto,
        "quantization": source.quantization.model_dump() if onto == "dequantized" else None,
        "matrices": matrices,
        "check": None,
        "versions": versions(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "finished": now(),
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


def merge_stop_ids(known: int | list[int] | None, source: AdapterSource, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids that end an answer: the base model's, and those that the adapter was trained to end with."""
    own = find_stop_ids(tokenizer, source.style) if source.stop_ids is None else source.stop_ids
    ids = [*(known if isinstance(known, list) else [known]), *own]
    return [number for number in dict.fromkeys(ids) if number is not None]


def record_check(output: Path, comparison: "Comparison") -> None:
    """Write the result of the check into merge.json."""
    described = read_json(output / MERGE_FILE, "--output")
    _write_json(output / MERGE_FILE, described | {"check": comparison.as_json()})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    replace_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
