"""An adapter's folder -> how to load and prompt it.

run.json (written by train_qlora.py) names base model, revision, quantization, prompt style and stop tokens. A plain PEFT adapter
names its base model; the rest is assumed, and `notes` say what. A checkpoint goes by the run.json of its run. Whether the
adapter's tensors fit the base model: attach.py.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import Config, ModelSettings, QuantizationSettings
from qlora_kit.config_file import load_config
from qlora_kit.errors import UserError
from qlora_kit.model.fingerprint import tensor_shapes, weights_fingerprint
from qlora_kit.model.hub import TOKENIZER_FILES, is_local, model_folder, read_json, remote_code_warning
from qlora_kit.model.tokenizer import load_tokenizer, tokenizer_fingerprint, vocabulary_fingerprint
from qlora_kit.output.checkpoints import candidates, newest_valid
from qlora_kit.output.folder import ADAPTER_FILES, CHECKPOINTS, CONFIG, PASSPORT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS_ARE = {"text": "continued as plain text", "chat": "put through the chat template", "instruction": "given as instructions"}


@dataclass(frozen=True)
class AdapterSource:
    """What an adapter's folder says about how to load and prompt it."""

    folder: Path
    model: ModelSettings
    tokenizer: ModelSettings  # where the tokenizer is: beside the adapter, else with the base model
    quantization: QuantizationSettings
    config: (
        Config  # the run's resolved settings: `generation` holds the defaults of answers, `data` how a text is cut into blocks
    )
    style: str  # how prompts were given in training: text, chat or instruction
    stop_ids: list[int] | None  # end an answer; None: unknown, to be taken from the tokenizer
    passport: dict[str, Any]  # run.json, with the fingerprints of base model and tokenizer; empty without one
    notes: tuple[str, ...] = ()  # what the user is to be told: what is assumed, or taken from elsewhere

    @property
    def complete(self) -> bool:
        """False: nothing says how the adapter was trained."""
        return bool(self.passport)


def read_adapter(name: str, trust_remote_code: bool = False) -> AdapterSource:
    """Read what an adapter's folder says.

    Args:
        trust_remote_code: the user's own word. What the folder says of it counts for nothing: anyone may have written that.

    Raises:
        UserError: no such folder, no adapter in it, an adapter without tensors, or a file that cannot be read; or the run was
            made with code that comes with its base model, and the user did not say that it may run here.
    """
    folder = _adapter_folder(name)
    key = f"--adapter {name}"
    _check_files(folder, key)
    run = _run_folder(folder)
    config = load_config(run / CONFIG) if (run / CONFIG).is_file() else None
    if (run / PASSPORT).is_file():
        source = _by_passport(folder, run, config or Config(), key)
    else:
        source = _by_assumption(folder, run, config, key)
    if source.model.trust_remote_code and not trust_remote_code:
        raise UserError(
            f"{key}: its run used Python code that comes with {source.model.name}, which would run here with all your rights; "
            "add --trust_remote_code if you have read it"
        )
    if not trust_remote_code:
        return source
    model, tokenizer = (found.model_copy(update={"trust_remote_code": True}) for found in (source.model, source.tokenizer))
    return replace(source, model=model, tokenizer=tokenizer, notes=(*source.notes, remote_code_warning(model)))


def _adapter_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    key = f"--adapter {name}"
    if folder.is_file():
        raise UserError(f"{key}: a file; name the folder that it is in: --adapter {folder.parent}")
    if not folder.is_dir():
        raise UserError(f"{key}: no such folder; train one: python train_qlora.py --output_dir {name}")
    missing = [file for file in ADAPTER_FILES if not (folder / file).is_file()]
    if missing:
        raise UserError(f"{key}: no adapter there ({missing[0]} not found); {_what_to_use(folder)}")
    return folder


def _what_to_use(folder: Path) -> str:
    """Instead of a folder without an adapter."""
    found = [*folder.glob(f"{CHECKPOINTS}/checkpoint-*"), *folder.glob("checkpoint-*")]  # of a run's folder, or of all of them
    if found:
        newest = max(found, key=lambda path: path.stat().st_mtime)
        return (
            f"its run is unfinished: continue it with --resume, or use {newest}" if newest.parent != folder else f"use {newest}"
        )
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return "it holds a whole model; name the folder of an adapter to it"
    return "name a folder that train_qlora.py finished"


def _check_files(folder: Path, key: str) -> None:
    """
    Raises:
        UserError: one of its two files is damaged, or that of the weights holds no tensor.
    """
    if not isinstance(read_json(folder / ADAPTER_FILES[1], key), dict):
        raise UserError(f"{key}: its {ADAPTER_FILES[1]} is no JSON object; copy it again")
    try:
        shapes = tensor_shapes(folder / ADAPTER_FILES[0])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{key}: {ADAPTER_FILES[0]} is damaged ({' '.join(str(error).split())[:100]}); copy it again") from None
    if not shapes:
        raise UserError(
            f"{key}: {ADAPTER_FILES[0]} holds no tensor; copy it again, or save the adapter again where it was trained"
        )


def _run_folder(folder: Path) -> Path:
    """A checkpoint's run is two levels up; any other folder is its own."""
    above = folder.absolute().parent
    is_checkpoint = above.name == CHECKPOINTS and not (folder / PASSPORT).is_file()
    return above.parent if is_checkpoint and any((above.parent / file).is_file() for file in (PASSPORT, CONFIG)) else folder


def _tokenizer_folder(*folders: Path) -> Path | None:
    return next((folder for folder in folders if any((folder / file).is_file() for file in TOKENIZER_FILES)), None)


def _by_passport(folder: Path, run: Path, config: Config, key: str) -> AdapterSource:
    passport = read_json(run / PASSPORT, key)
    try:
        base, trusted = passport["base_model"], passport["trust_remote_code"]
        name = base["name"] if not base["folder"] or Path(base["name"]).is_dir() else base["folder"]
        revision = base["revision"] if is_local(name) else passport.get("base_commit") or base["revision"]
        model = ModelSettings(name=name, revision=revision, trust_remote_code=trusted)
        beside = _tokenizer_folder(folder, run)
        if passport["prompt_style"] not in PROMPTS_ARE:
            raise ValueError(f"prompt_style {passport['prompt_style']!r}")
        return AdapterSource(
            folder=folder,
            model=model,
            tokenizer=ModelSettings(name=str(beside), trust_remote_code=trusted) if beside else model,
            quantization=QuantizationSettings(**passport["quantization"]),
            config=config,
            style=passport["prompt_style"],
            stop_ids=passport.get("stop_ids"),
            passport=passport,
            notes=(f"{folder} is a checkpoint: loaded and prompted as {run / PASSPORT} says",) if run != folder else (),
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{key}: its run.json is damaged ({reason}); copy it again, or delete it to load a plain adapter"
        ) from None


def _by_assumption(folder: Path, run: Path, config: Config | None, key: str) -> AdapterSource:
    """A plain PEFT adapter, or a checkpoint of a run that has not finished."""
    base = read_json(folder / ADAPTER_FILES[1], key).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{key}: its adapter_config.json names no base model; add base_model_name_or_path")
    model = config.model if config and config.model.name == base else ModelSettings(name=base)
    beside = _tokenizer_folder(folder, run)
    style = _style_of_run(folder, run, config.data.format) if config else "chat" if beside and _has_template(beside) else "text"
    packing = (config or Config()).quantization
    bits = f"4-bit {packing.quant_type.upper()}" if packing.load_in_4bit else "16-bit"
    note = f"{folder} has no run.json: taking {base} in {bits}; prompts are {PROMPTS_ARE[style]}"
    return AdapterSource(
        folder=folder,
        model=model,
        tokenizer=ModelSettings(name=str(beside)) if beside else model,
        quantization=packing,
        config=config or Config(),
        style=style,
        stop_ids=None,
        passport={},
        notes=(note,),
    )


def _has_template(folder: Path) -> bool:
    """Whether the tokenizer there was saved with a chat template; whoever saves one beside an adapter has trained on chats."""
    settings = folder / "tokenizer_config.json"
    stated = read_json(settings, "--adapter").get("chat_template") if settings.is_file() else None
    return bool(stated) or (folder / "chat_template.jinja").is_file()


def _style_of_run(folder: Path, run: Path, stated: str) -> str:
    """Return how a run gave its prompts: what its checkpoint's manifest says, else what the format that is `stated` implies."""
    checkpoint, _ = newest_valid([folder] if run != folder else candidates(run / CHECKPOINTS))
    if checkpoint:
        return checkpoint.run["prompt_style"]
    return {"auto": "text", "text": "text", "instruction": "instruction"}.get(stated, "chat")


# What it was trained with, before anything large is loaded


def fetch_base(source: AdapterSource, fetch: Callable[[ModelSettings], Path]) -> Path:
    """What hub.fetch_tokenizer or hub.fetch_model makes ready of an adapter's base model.

    Raises:
        UserError: as they do, with the place that names the base model here.
    """
    try:
        return fetch(source.model)
    except UserError as error:
        named = "base_model in its run.json" if source.complete else f"base_model_name_or_path in its {ADAPTER_FILES[1]}"
        key = f"--adapter {source.folder}: {named}: "
        raise UserError(*(problem.replace("model.name: ", key, 1) for problem in error.lines)) from None


def check_base(source: AdapterSource) -> None:
    """Compare the base model's weights with those of training; nothing is loaded.

    Raises:
        UserError: they are others.
    """
    recorded, folder = source.passport.get("base_weights_sha256"), model_folder(source.model)
    found = weights_fingerprint(folder) if folder else None
    if recorded and found and found != recorded:
        raise UserError(
            f"--adapter {source.folder}: {source.model.name} has other weights than the adapter was trained on (fingerprint "
            f"{found[:12]}, run.json has {recorded[:12]}); restore them, or delete base_weights_sha256 from run.json to go on"
        )


def load_checked_tokenizer(source: AdapterSource) -> "PreTrainedTokenizerBase":
    """The tokenizer that stands beside the adapter, its chat template too; else the base model's.

    Raises:
        UserError: it cannot be loaded, or its vocabulary is not that of training.
    """
    tokenizer = load_tokenizer(source.tokenizer)
    recorded = source.passport.get("tokenizer_sha256")
    if recorded and tokenizer_fingerprint(tokenizer) != recorded:
        # A later library may describe the same tokenizer in other words; the vocabulary has no two descriptions.
        vocabulary = source.passport.get("vocabulary_sha256")
        if vocabulary is None:
            print(
                f"{source.folder}: the tokenizer is described otherwise than in training (tokenizer_sha256 in run.json): "
                "it may be another one",
                file=sys.stderr,
            )
        elif vocabulary != vocabulary_fingerprint(tokenizer):
            raise UserError(
                f"--adapter {source.folder}: the tokenizer in {source.tokenizer.name} has another vocabulary than the adapter "
                "was trained with (vocabulary_sha256 in run.json); copy its tokenizer files again"
            )
    return tokenizer
