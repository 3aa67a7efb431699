"""Find or download a model's files.

A name is a local folder or a Hub name, whose files come from the Hub's cache or are downloaded. The Hub is tested once. If it
does not answer, the process goes offline before any Hugging Face library is imported, so that a machine without a network uses
its cache at once instead of printing minutes of retries.
"""

import os
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from qlora_kit.config import ModelSettings
from qlora_kit.errors import UserError
from qlora_kit.model.small_files import check_small_files
from qlora_kit.model.weight_files import read_headers
from qlora_kit.planning.model_config import check_model_config
from qlora_kit.planning.shape import KNOWN_CONFIGS
from qlora_kit.untrusted import read_json, user_path

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # config and tokenizer
MODEL_FILES = [*SMALL_FILES, "*.safetensors"]  # no pickles, no code
FILE_SUFFIXES = (".txt", ".md", ".text", ".rst", ".json", ".jsonl", ".csv", ".parquet")  # what data/files.py reads
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def prepare(model: str, *data: str) -> None:
    """Go offline if one of the names needs the Hub and the Hub does not answer; call it before transformers is imported."""
    if not all(map(is_local, (model, *data))):
        go_offline_if_unreachable()


def go_offline_if_unreachable(timeout_seconds: float = 5.0) -> None:
    """Set HF_HUB_OFFLINE if the Hub does not answer."""
    if os.environ.get("HF_HUB_OFFLINE"):
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout_seconds)
    except urllib.error.HTTPError:
        pass  # an error page is an answer
    except (OSError, ValueError, HTTPException):  # no answer, no address, or an answer of something else
        os.environ["HF_HUB_OFFLINE"] = "1"


def is_local(name: str) -> bool:
    """Return whether a model or data set name is a path: it exists, or no Hub name looks like it."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    return os.path.exists(name) or looks_like_path or name.lower().endswith(FILE_SUFFIXES)


def read_model_config(model: ModelSettings) -> dict[str, Any]:
    """Return the base model's config.json; that of the default model needs no download.

    Raises:
        UserError: as fetch_model and read_config.
    """
    if not is_local(model.name) and model.name in KNOWN_CONFIGS:
        return KNOWN_CONFIGS[model.name]
    return read_config(_local_folder(model) if is_local(model.name) else _download(model, ["config.json"]), model.name)


def read_config(folder: Path, name: object) -> dict[str, Any]:
    """Return the config.json in a folder.

    Args:
        name: of the model, for the message.

    Raises:
        UserError: it cannot be read, or a value has another type or is out of range.
    """
    config = read_json(folder / "config.json", "model.name")
    try:
        check_model_config(config)
    except UserError as error:
        raise error.under("model.name", name) from None
    return config


def fetch_tokenizer(model: ModelSettings) -> Path:
    """Download config and tokenizer unless they are on this machine; return their folder.

    Raises:
        UserError: there is no such model, no access to it, neither a network nor a cached copy, or a file is missing.
    """
    folder = _local_folder(model) if is_local(model.name) else _download(model, SMALL_FILES)
    _require_tokenizer(folder, model)
    check_small_files(folder, "model.name", model.name)
    return folder


def fetch_model(model: ModelSettings) -> Path:
    """Download all files of the base model unless they are on this machine; return their folder.

    Raises:
        UserError: as fetch_tokenizer, or the weights are not sound safetensors files.
    """
    folder = fetch_weights(model)
    _require_tokenizer(folder, model)
    return folder


def fetch_weights(model: ModelSettings) -> Path:
    """Download the files of the base model as fetch_model does, whether there is a tokenizer or not."""
    folder = _local_folder(model) if is_local(model.name) else _download(model, MODEL_FILES)
    if not any(folder.glob("*.safetensors")):
        remedy = "save the model with save_pretrained and use that folder"
        raise UserError("model.name", model.name, "has no *.safetensors weights", remedy)
    if (folder / "adapter_config.json").exists():
        problem = "holds an adapter_config.json, and transformers would load the model that it names"
        raise UserError("model.name", model.name, problem, "use a folder with the model alone")
    check_small_files(folder, "model.name", model.name)
    tensors, config = read_headers(folder), read_config(folder, model.name)
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    if isinstance(layers, int) and layers > len(tensors):  # to build them without weights would take a minute
        problem = f"states {layers} layers in its config.json, and its files hold {len(tensors)} tensors"
        raise UserError("model.name", model.name, problem, "restore its config.json, or copy or download the model again")
    return folder


def model_folder(model: ModelSettings) -> Path | None:
    """Return the base model's folder on this machine, or None; one in the Hub's cache is named by its commit."""
    if is_local(model.name):
        return user_path(model.name, "model.name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=MODEL_FILES, local_files_only=True))
    except (OSError, ValueError):
        return None


def read_context(folder: Path) -> int | None:
    """Return the most tokens that the model in `folder` reads, as its config.json states it; None if it states nothing."""
    settings = read_config(folder, folder)
    return settings.get("max_position_embeddings") or settings.get("n_positions")  # the second is GPT-2's


def remote_code_warning(model: ModelSettings) -> str:
    """Return the warning for model.trust_remote_code."""
    pin = "" if model.revision or is_local(model.name) else "; set model.revision to the commit that you have read"
    return f"warning: model.trust_remote_code: Python code that comes with {model.name} runs here with all your rights{pin}"


def _require_tokenizer(folder: Path, model: ModelSettings) -> None:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        remedy = "copy the base model's tokenizer files, such as tokenizer.json, into its folder"
        raise UserError("model.name", model.name, "has no tokenizer", remedy)


def _local_folder(model: ModelSettings) -> Path:
    folder = user_path(model.name, "model.name")
    if not folder.is_dir():
        remedy = "use a folder with config.json, or a Hub model such as Qwen/Qwen2.5-3B-Instruct"
        raise UserError("model.name", model.name, "is no existing folder", remedy)
    if not (folder / "config.json").exists():
        raise UserError("model.name", model.name, "has no config.json", "use the folder that save_pretrained wrote")
    return folder


def _download(model: ModelSettings, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    name = model.name
    try:
        return Path(snapshot_download(name, revision=model.revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        remedy = "accept its licence on the Hub, then run hf auth login"
        raise UserError("model.name", name, "is open only to accounts that were granted access", remedy) from None
    except errors.RevisionNotFoundError:
        problem = f"is no branch, tag or commit of {name}"
        raise UserError("model.revision", model.revision, problem, "correct it, or use null for the newest") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        remedy = "correct the name, or run hf auth login if the model is private"
        raise UserError("model.name", name, "is neither a folder here nor a model on the Hub", remedy) from None
    except (OSError, errors.HfHubHTTPError):  # the library's own offline errors are OSErrors too
        problem = "is not on this machine, and the Hub cannot be reached"
        remedy = f"download it with a network (hf download {name}), or use a local folder"
        raise UserError("model.name", name, problem, remedy) from None
    except Exception as error:  # whatever the library makes of an endpoint that is no Hub
        problem = f"cannot be downloaded ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise UserError("model.name", name, problem, "correct HF_ENDPOINT, or use a local folder") from None
