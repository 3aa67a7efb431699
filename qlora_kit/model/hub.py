"""Base models and data sets by name: from a local folder, from the Hub's cache, or downloaded, and one line when neither works.

The Hub is asked once whether it answers. When it does not, the process goes offline before any Hugging Face library is
imported, so that a machine without a network uses its cache at once instead of printing minutes of retries.
"""

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from qlora_kit.config import ModelSettings
from qlora_kit.errors import UserError
from qlora_kit.planning.shape import KNOWN_CONFIGS

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # config and tokenizer
MODEL_FILES = [*SMALL_FILES, "*.safetensors"]  # no pickles, no code
FILE_SUFFIXES = (".txt", ".md", ".text", ".rst", ".json", ".jsonl", ".csv", ".parquet")  # what sources.py reads
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def go_offline_if_unreachable(timeout_seconds: float = 5.0) -> None:
    """Set HF_HUB_OFFLINE when the Hub does not answer. Call it before importing transformers or datasets."""
    if os.environ.get("HF_HUB_OFFLINE"):
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout_seconds)
    except urllib.error.HTTPError:
        pass  # an error page is an answer
    except (OSError, ValueError):
        os.environ["HF_HUB_OFFLINE"] = "1"


def is_local(name: str) -> bool:
    """Whether a model or data set name is a path: it exists, or no Hub name is written like it."""
    written_out = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    return Path(name).exists() or written_out or name.lower().endswith(FILE_SUFFIXES)


def read_model_config(model: ModelSettings) -> dict[str, Any]:
    """The base model's config.json, without its weights; the default model's is known without a download.

    Raises:
        UserError: as fetch_model.
    """
    if is_local(model.name):
        return read_json(_local_folder(model) / "config.json", "model.name")
    if model.name in KNOWN_CONFIGS:
        return KNOWN_CONFIGS[model.name]
    return read_json(_download(model, ["config.json"]) / "config.json", "model.name")


def fetch_tokenizer(model: ModelSettings) -> Path:
    """Make the base model's config and tokenizer ready on this machine: a few MB, enough to prepare data; returns their folder.

    Raises:
        UserError: no such model, no access, no network and no cached copy, or files missing: one line with the remedy.
    """
    return _fetch(model, SMALL_FILES)


def fetch_model(model: ModelSettings) -> Path:
    """Make all of the base model's files ready on this machine; returns their folder.

    Raises:
        UserError: as fetch_tokenizer.
    """
    folder = _fetch(model, MODEL_FILES)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model.name: {model.name}: no *.safetensors weights; save the model with save_pretrained and name that folder"
        )
    return folder


def model_folder(model: ModelSettings) -> Path | None:
    """Where the base model's files are on this machine: a local folder, or a snapshot of the Hub's cache, named by its commit."""
    if is_local(model.name):
        return Path(model.name).expanduser()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=MODEL_FILES, local_files_only=True))
    except (OSError, ValueError):
        return None


def read_context(folder: Path) -> int | None:
    """Tokens that the model in `folder` reads at most, by its config.json; None where it states none."""
    settings = read_json(folder / "config.json", "model.name")
    return settings.get("max_position_embeddings") or settings.get("n_positions")  # the second is GPT-2's


def _fetch(model: ModelSettings, patterns: list[str]) -> Path:
    folder = _local_folder(model) if is_local(model.name) else _download(model, patterns)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        lacking = "the folder has no tokenizer (tokenizer.json); copy the base model's tokenizer files into it"
        raise UserError(f"model.name: {model.name}: {lacking}")
    return folder


def _local_folder(model: ModelSettings) -> Path:
    folder, key = Path(model.name).expanduser(), f"model.name: {model.name}"
    if not folder.is_dir():
        raise UserError(f"{key}: no such folder; name a folder with config.json, or a Hub model such as Qwen/Qwen2.5-3B-Instruct")
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}: the folder has no config.json; name the folder that save_pretrained wrote")
    return folder


def read_json(path: Path, key: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path}: not readable as JSON ({error}); copy it again from its source") from None


def _download(model: ModelSettings, patterns: list[str]) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    key = f"model.name: {model.name}"
    try:
        return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=patterns))
    except hub.GatedRepoError:
        raise UserError(f"{key}: access must be granted; accept its licence on the Hub, then run: hf auth login") from None
    except hub.RevisionNotFoundError:
        raise UserError(
            f"model.revision: {model.revision}: {model.name} has no such branch, tag or commit; null takes the newest"
        ) from None
    except (hub.RepositoryNotFoundError, hub.HFValidationError):
        raise UserError(
            f"{key}: neither a folder here nor a model on the Hub; correct the name, or log in if it is private"
        ) from None
    except (OSError, hub.HfHubHTTPError):  # the hub's own offline errors are OSErrors too
        raise UserError(
            f"{key}: not on this machine, and the Hub cannot be reached; download it where there is a network "
            f"(hf download {model.name}), or name a local folder"
        ) from None


def remote_code_warning(model: ModelSettings) -> str:
    """The line for model.trust_remote_code."""
    pin = "" if model.revision or is_local(model.name) else "; name the commit that you have read in model.revision"
    return f"warning: model.trust_remote_code: Python code that comes with {model.name} runs here with all your rights{pin}"
