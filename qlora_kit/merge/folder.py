"""The files of a merged model besides its weights: config, tokenizer, generation config, and merge.json."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_kit.adapter.folder import AdapterSource
from qlora_kit.data.chat_template import find_stop_ids
from qlora_kit.merge.place import KEY, MERGE_FILE
from qlora_kit.output.folder import replace_text
from qlora_kit.output.provenance import now, versions
from qlora_kit.secrets import redact
from qlora_kit.untrusted import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Base = Literal["original", "dequantized"]  # the weights that the update is added to


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


def merge_stop_ids(known: int | list[int] | None, source: AdapterSource, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids that end an answer: the base model's, and those that the adapter was trained to end with."""
    own = find_stop_ids(tokenizer, source.style) if source.stop_ids is None else source.stop_ids
    ids = [*(known if isinstance(known, list) else [known]), *own]
    return [number for number in dict.fromkeys(ids) if number is not None]


def record_check(output: Path, check: dict[str, Any]) -> None:
    """Write the result of the check into merge.json."""
    described = read_json(output / MERGE_FILE, KEY)
    _write_json(output / MERGE_FILE, described | {"check": check})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    replace_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
