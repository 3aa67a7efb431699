"""The folder of a merged model: may it be written, how it comes into being whole, and what lies in it beside the weights."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapter.folder import AdapterSource
from qlora_kit.config import GIB
from qlora_kit.data.chat_template import find_stop_ids
from qlora_kit.errors import Failed, UserError
from qlora_kit.model.hub import read_json
from qlora_kit.output.provenance import now, versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.merge.check import Comparison

MARK = "merge.json"  # says that a folder is a merge, and of what
SMALL_FILES_BYTES = 64 * 2**20  # room for config and tokenizer: Qwen2.5's takes 11 MiB


def check_output(name: str, overwrite: bool, source: AdapterSource) -> Path:
    """The output folder, when a merge may be written there. Creates and removes nothing.

    Raises:
        UserError: it holds something, or cannot be written.
    """
    folder, key = Path(name).expanduser().resolve(), f"--output {name}"
    parent = next(path for path in folder.parents if path.exists())
    if (folder.exists() and not folder.is_dir()) or not parent.is_dir():
        raise UserError(f"{key}: {folder if folder.exists() else parent} is a file, not a folder; name another --output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {parent} cannot be written; change its permissions or name another --output")
    for used in (source.folder, Path(source.model.name).expanduser()):
        if used.exists() and used.resolve().is_relative_to(folder):
            raise UserError(f"{key}: holds {used}, which is read here; name another --output")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARK).is_file():
            raise UserError(f"{key}: is not empty; name a new folder")
        if not overwrite:
            raise UserError(f"{key}: holds a merged model; replace it with --overwrite, or name another --output")
    return folder


def check_disk(output: Path, weights: int) -> None:
    """
    Raises:
        UserError: the disk has less room than the merged model takes. A model that it replaces stays until the new one is whole.
    """
    parent = next(path for path in output.parents if path.exists())
    needed, free = weights + SMALL_FILES_BYTES, shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"--output {output}: needs {needed / GIB:.2f} GiB, and its disk has {free / GIB:.2f} GiB free: "
            f"{(needed - free) / GIB:.2f} GiB missing; free them, or name a folder on another disk"
        )


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place when all went well, and is removed otherwise.

    Raises:
        Failed: the disk refuses.
    """
    staging, former = (output.with_name(f".{output.name}.{what}-{os.getpid()}") for what in ("merging", "former"))
    try:
        staging.mkdir(parents=True)
        yield staging
        if output.exists():
            os.rename(output, former)
        os.rename(staging, output)
    except OSError as error:
        raise Failed(f"{output}: cannot be written ({error.strerror or error}); nothing was left there") from None
    finally:
        if former.exists() and not output.exists():
            os.rename(former, output)
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def copy_small_files(folder: Path, base: Path, source: AdapterSource, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Config and code of the base model, tokenizer and chat template of the adapter, and where answers end."""
    for path in [base / "config.json", *(base.glob("*.py") if source.model.trust_remote_code else ())]:
        shutil.copyfile(path, folder / path.name)
    tokenizer.save_pretrained(folder)
    settings = read_json(base / "config.json", "model.name")
    known = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {key: settings[key] for key in known if settings.get(key) is not None}
    if (base / "generation_config.json").is_file():
        generation = read_json(base / "generation_config.json", "model.name")
    if ids := stop_ids(generation.get("eos_token_id"), source, tokenizer):
        generation["eos_token_id"] = ids
    if tokenizer.pad_token_id is not None:
        generation["pad_token_id"] = tokenizer.pad_token_id
    _write_json(folder / "generation_config.json", generation)


def stop_ids(known: int | list[int] | None, source: AdapterSource, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids that end an answer: the base model's, and those that the adapter was trained to end with."""
    ids: list[Any] = known if isinstance(known, list) else [known]
    ids = [*ids, *(find_stop_ids(tokenizer, source.style) if source.stop_ids is None else source.stop_ids)]
    return [number for number in dict.fromkeys(ids) if number is not None]


def write_mark(folder: Path, source: AdapterSource, onto: str, matrices: int) -> None:
    mark: dict[str, Any] = {
        "adapter": str(source.folder.resolve()),
        "base_model": source.model.model_dump(),
        "onto": onto,
        "quantization": source.quantization.model_dump() if onto == "dequantized" else None,
        "matrices": matrices,
        "check": None,
        "versions": versions(),
        "command": shlex.join(["python", "-m", "qlora_kit.merge", *sys.argv[1:]]),
        "finished": now(),
    }
    _write_json(folder / MARK, mark)


def record_check(output: Path, result: "Comparison", what: str) -> None:
    mark = read_json(output / MARK, f"--output {output}")
    mark["check"] = asdict(result) | {"data": what, "rule": result.rule, "passed": result.passed}
    _write_json(output / MARK, mark)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
