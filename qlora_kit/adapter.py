"""An adapter's folder -> how to load and prompt it.

run.json (written by train_qlora.py) names base model, revision, quantization and prompt style; a plain PEFT adapter names its
base model, and the rest takes the defaults.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.checkpoint import ADAPTER_FILES, CONFIG, PASSPORT
from qlora_kit.config import UserError, load_config
from qlora_kit.hub import read_json
from qlora_kit.settings import Config, ModelConfig, QuantizationConfig


@dataclass(frozen=True)
class AdapterSource:
    """What an adapter's folder says about how to load and prompt it."""

    folder: Path
    model: ModelConfig
    quantization: QuantizationConfig
    config: Config  # the run's resolved settings; of these, `generation` holds the defaults of answers
    style: str  # how prompts were given in training: text, chat or instruction
    separator_id: int | None  # ends a text
    complete: bool  # False: a plain PEFT adapter, whose quantization and prompt style are unknown


def read_adapter(name: str) -> AdapterSource:
    """Read what an adapter's folder says.

    Raises:
        UserError: no such folder, no adapter in it, or a file that cannot be read.
    """
    folder = _adapter_folder(name)
    key = f"--adapter {name}"
    settings = load_config(folder / CONFIG) if (folder / CONFIG).is_file() else Config()
    if (folder / PASSPORT).is_file():
        return _by_passport(folder, read_json(folder / PASSPORT, key), settings, key)
    base = read_json(folder / ADAPTER_FILES[1], key).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{key}: its adapter_config.json names no base model; add base_model_name_or_path")
    return AdapterSource(folder, ModelConfig(name=base), settings.quantization, settings, "text", None, complete=False)


def _adapter_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    key = f"--adapter {name}"
    if not folder.is_dir():
        raise UserError(f"{key}: no such folder; train one: python train_qlora.py --output_dir {name}")
    missing = [file for file in ADAPTER_FILES if not (folder / file).is_file()]
    if missing:
        newest = sorted(folder.glob("checkpoints/checkpoint-*"), key=lambda path: path.stat().st_mtime)
        hint = (
            f"its run is unfinished: continue it with --resume, or use {newest[-1]}"
            if newest
            else "name a folder that train_qlora.py finished"
        )
        raise UserError(f"{key}: no adapter there ({missing[0]} not found); {hint}")
    return folder


def _by_passport(folder: Path, passport: dict[str, Any], settings: Config, key: str) -> AdapterSource:
    try:
        base = passport["base_model"]
        name = base["name"] if not base["folder"] or Path(base["name"]).is_dir() else base["folder"]
        return AdapterSource(
            folder=folder,
            model=ModelConfig(name=name, revision=base["revision"], trust_remote_code=passport["trust_remote_code"]),
            quantization=QuantizationConfig(**passport["quantization"]),
            config=settings,
            style=passport["prompt_style"],
            separator_id=passport["separator_id"],
            complete=True,
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{key}: its run.json is damaged ({reason}); copy it again, or delete it to load a plain adapter"
        ) from None
