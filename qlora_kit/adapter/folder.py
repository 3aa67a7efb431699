"""An adapter's folder: how to load and prompt the adapter.

run.json, which train_qlora.py writes, names base model, revision, quantization, prompt style and stop tokens. A plain PEFT
adapter names its base model; the rest is assumed, and `notes` state it. A checkpoint uses the run.json of its run. attach.py
checks that the adapter's tensors fit the base model.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapter.run_record import read_record
from qlora_kit.adapter.settings import IA3File, LoraFile, read_settings
from qlora_kit.config import Config, ModelSettings, QuantizationSettings
from qlora_kit.config_file import load_config
from qlora_kit.errors import UserError, spell_out
from qlora_kit.model.fingerprint import weights_fingerprint
from qlora_kit.model.hub import TOKENIZER_FILES, is_local, model_folder, remote_code_warning
from qlora_kit.model.tokenizer import load_tokenizer, tokenizer_fingerprint, vocabulary_fingerprint
from qlora_kit.model.weight_files import StoredTensor, read_header
from qlora_kit.output.checkpoints import find_newest_valid, list_checkpoints
from qlora_kit.output.folder import ADAPTER_FILES, CHECKPOINT_PREFIX, CHECKPOINTS, CONFIG, PROVENANCE, digest
from qlora_kit.output.new_run import finish_for_reader
from qlora_kit.shipped import locate, spell_command
from qlora_kit.untrusted import read_json, user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = ("F64", "F32", "F16", "BF16")  # of an adapter's numbers
PICKLE = "adapter_model.bin"  # of adapters that peft saved before safetensors
STYLES = {"text": "continued as plain text", "chat": "put through the chat template", "instruction": "given as instructions"}


@dataclass(frozen=True)
class AdapterSource:
    """The content of an adapter's folder, without its weights.

    Attributes:
        settings: what peft gets of adapter_config.json.
        tokenizer: the tokenizer saved with the adapter, else the base model's.
        config: the run's resolved settings: `generation` holds the defaults of answers, `data` how a text is cut into blocks.
        style: how prompts were given in training, a key of STYLES.
        stop_ids: tokens that end an answer; None leaves them to the tokenizer.
        provenance: what RunRecord takes of run.json, such as the fingerprints of base model and tokenizer; empty without one.
        notes: lines for the user: settings that are assumed, or taken from another folder.
    """

    folder: Path
    settings: LoraFile | IA3File
    model: ModelSettings
    tokenizer: ModelSettings
    quantization: QuantizationSettings
    config: Config
    style: str
    stop_ids: list[int] | None
    provenance: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def chat_template(self) -> str | None:
        """The file with the run's chat template, where no tokenizer was saved with it: beside a run that did not end."""
        return self.config.data.chat_template if self.tokenizer == self.model else None


def read_adapter(name: str, trust_remote_code: bool = False) -> AdapterSource:
    """Read an adapter's folder; loads no weights.

    Args:
        trust_remote_code: the user's decision. A folder may come from anyone, so its own setting is not enough.

    Raises:
        UserError: the folder does not exist or holds no adapter, a file is damaged, or the run used code that comes with its base
            model and `trust_remote_code` is false.
    """
    folder, moved = _adapter_folder(name)
    settings, left_out = read_settings(folder)
    if not read_adapter_header(folder):
        raise UserError("--adapter", folder, f"has no tensors in {ADAPTER_FILES[0]}", "copy it again, or save the adapter again")
    run = _run_folder(folder)
    config = _read_config(run / CONFIG)
    if os.path.lexists(run / PROVENANCE):
        source = _from_provenance(folder, settings, run, config or Config())
    else:
        source = _from_assumptions(folder, settings, run, config)
    notes = (*moved, *source.notes, *_describe_left_out(folder, left_out), *_describe_other_adapter(source))
    source = replace(source, notes=tuple(map(spell_out, notes)))
    if source.model.trust_remote_code and not trust_remote_code:
        problem = f"was trained with Python code that comes with {source.model.name} and would run here with all your rights"
        raise UserError("--adapter", name, problem, "add --trust_remote_code if you have read it")
    if not trust_remote_code:
        return source
    model, tokenizer = (found.model_copy(update={"trust_remote_code": True}) for found in (source.model, source.tokenizer))
    return replace(source, model=model, tokenizer=tokenizer, notes=(*source.notes, remote_code_warning(model)))


def _describe_left_out(folder: Path, names: list[str]) -> list[str]:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    listed = ", ".join(name[:40] for name in names[:3]) + more
    return [f"{folder}: left out of its {ADAPTER_FILES[1]}, as no LoRA needs it: {listed}"] if names else []


def _describe_other_adapter(source: AdapterSource) -> list[str]:
    """Return a line if the adapter is not the one that the run.json beside it describes."""
    recorded, file = source.provenance.get("adapter_sha256"), source.folder / ADAPTER_FILES[0]
    if recorded is None or not (source.folder / PROVENANCE).is_file() or recorded == digest(file):
        return []
    return [f"{file} was changed after its run: its SHA-256 is not the one in {PROVENANCE}, which may not describe it"]


def _read_config(path: Path) -> Config | None:
    """Return the resolved config beside an adapter; None without one."""
    if not os.path.lexists(path):
        return None
    if not os.path.isfile(path):
        raise UserError("--adapter", path, "is no file", "copy it again, or delete it")
    try:
        return load_config(path)
    except UserError as error:
        raise UserError.of(replace(one, key="--adapter") if one.key == "--config" else one for one in error.problems) from None


def read_adapter_header(folder: Path) -> dict[str, StoredTensor]:
    """Return an adapter's tensors by name; none is read.

    Raises:
        UserError: its file of weights is damaged, or holds something else than floating-point numbers.
    """
    try:
        header = read_header(folder / ADAPTER_FILES[0])
    except PermissionError:
        raise UserError("--adapter", folder, f"may not be read ({ADAPTER_FILES[0]})", "change its permissions") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError("--adapter", folder, f"has a damaged {ADAPTER_FILES[0]} ({reason})", "copy it again") from None
    for stored in header.values():
        if stored.dtype not in DTYPES:
            problem = f"holds {stored.name[:100]} in {stored.dtype}, and an adapter has floating-point numbers"
            raise UserError("--adapter", folder, problem, "copy it again, or save the adapter again")
    return header


def _adapter_folder(name: str) -> tuple[Path, list[str]]:
    """Return the folder, and lines on what a killed run had left to be moved in it."""
    folder = user_path(name, "--adapter")
    if os.path.isfile(folder):
        raise UserError("--adapter", name, "is a file, not a folder", f"use its folder: --adapter {folder.parent}")
    if not os.path.isdir(folder):
        train = spell_command("train_qlora.py")
        laptop = f"on a laptop {train} --config configs/tiny.yaml, whose adapter is output_tiny"
        raise UserError("--adapter", name, "does not exist", f"train one with {train} --output_dir {name}; {laptop}")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError("--adapter", name, "cannot be searched", "change its permissions")
    if str(folder).encode(errors="replace").decode() != str(folder):
        raise UserError("--adapter", os.fsencode(folder), "is not named in UTF-8", "rename it")
    moved = finish_for_reader(folder, "--adapter")
    missing = [file for file in ADAPTER_FILES if not os.path.isfile(folder / file)]
    if missing:
        problem, remedy = f"holds no adapter: {missing[0]} is missing", _suggest_folder(folder)
        if ADAPTER_FILES[0] in missing and os.path.isfile(folder / PICKLE):
            problem += f", and {PICKLE} is a pickle, which may run any code when it is loaded"
            remedy = "load and save it again with peft"
        raise UserError("--adapter", name, problem, remedy)
    return folder, moved


def _suggest_folder(folder: Path) -> str:
    """Return the remedy for a folder without an adapter."""
    patterns = (
        f"{CHECKPOINTS}/{CHECKPOINT_PREFIX}*",
        f"{CHECKPOINT_PREFIX}*",
    )  # in a run's folder, or in that of its checkpoints
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    if found:
        newest = max(found, key=lambda path: path.stat().st_mtime)
        return f"use {newest}" if newest.parent == folder else f"continue its unfinished run with --resume, or use {newest}"
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return "use the folder of an adapter to this whole model"
    return "use a folder that train_qlora.py finished"


def _run_folder(folder: Path) -> Path:
    """Return the folder of a checkpoint's run, two levels up; any other folder itself."""
    above = folder.absolute().parent
    is_checkpoint = above.name == CHECKPOINTS and not (folder / PROVENANCE).is_file()
    return above.parent if is_checkpoint and any((above.parent / file).is_file() for file in (PROVENANCE, CONFIG)) else folder


def _tokenizer_folder(*folders: Path) -> Path | None:
    """Return the first folder with a tokenizer."""
    return next((folder for folder in folders if any((folder / file).is_file() for file in TOKENIZER_FILES)), None)


def _from_provenance(folder: Path, settings: LoraFile | IA3File, run: Path, config: Config) -> AdapterSource:
    record = read_record(run, folder)
    base, trusted = record.base_model, record.trust_remote_code
    name = base.name if not base.folder or os.path.isdir(base.name) else locate(base.folder)
    revision = base.revision if is_local(name) else record.base_commit or base.revision
    model = ModelSettings(name=name, revision=revision, trust_remote_code=trusted)
    own = _tokenizer_folder(folder, run)
    return AdapterSource(
        folder=folder,
        settings=settings,
        model=model,
        tokenizer=ModelSettings(name=str(own), trust_remote_code=trusted) if own else model,
        quantization=record.quantization,
        config=config,
        style=record.prompt_style,
        stop_ids=record.stop_ids,
        provenance=record.model_dump(),
        notes=(f"{folder} is a checkpoint: loaded and prompted as {run / PROVENANCE} says",) if run != folder else (),
    )


def _from_assumptions(folder: Path, settings: LoraFile | IA3File, run: Path, config: Config | None) -> AdapterSource:
    """Describe a plain PEFT adapter, or a checkpoint of an unfinished run."""
    base = settings.base_model_name_or_path
    if not base:
        raise UserError("--adapter", folder, f"names no base model in {ADAPTER_FILES[1]}", "add base_model_name_or_path")
    same = config and os.path.abspath(os.path.expanduser(config.model.name)) == os.path.abspath(base)
    model = config.model if config and same else ModelSettings(name=base)
    own = _tokenizer_folder(folder, run)
    if config:
        style = _style_of_run(folder, run, config.data.format)
    else:  # a tokenizer with a chat template is saved with an adapter that was trained on chats
        style = "chat" if own and _has_template(own) else "text"
    quantization = (config or Config()).quantization
    bits = f"4-bit {quantization.quant_type.upper()}" if quantization.load_in_4bit else "16-bit"
    return AdapterSource(
        folder=folder,
        settings=settings,
        model=model,
        tokenizer=ModelSettings(name=str(own)) if own else model,
        quantization=quantization,
        config=config or Config(),
        style=style,
        stop_ids=None,
        provenance={},
        notes=(f"{folder} has no {PROVENANCE}: assuming {base} in {bits}; prompts are {STYLES[style]}",),
    )


def _has_template(folder: Path) -> bool:
    """Return whether the tokenizer in a folder has a chat template."""
    settings = folder / "tokenizer_config.json"
    stated = read_json(settings, "--adapter").get("chat_template") if settings.is_file() else None
    return bool(stated) or (folder / "chat_template.jinja").is_file()


def _style_of_run(folder: Path, run: Path, data_format: str) -> str:
    """Return the prompt style that a checkpoint's manifest states, else the one that data.format implies."""
    checkpoint, _ = find_newest_valid([folder] if run != folder else list_checkpoints(run / CHECKPOINTS))
    if checkpoint and checkpoint.run.get("prompt_style") in tuple(STYLES):
        return checkpoint.run["prompt_style"]
    return {"auto": "text", "text": "text", "instruction": "instruction"}.get(data_format, "chat")


def fetch_base(source: AdapterSource, fetch: Callable[[ModelSettings], Path]) -> Path:
    """Return the folder of an adapter's base model.

    Args:
        fetch: hub.fetch_tokenizer or hub.fetch_model.

    Raises:
        UserError: as they do, with the adapter's file that names the base model.
    """
    try:
        return fetch(source.model)
    except UserError as error:
        file = PROVENANCE if source.provenance else ADAPTER_FILES[1]
        raise UserError.of(
            replace(one, key="--adapter", value=source.folder, problem=f"names {one.value} in its {file}, which {one.problem}")
            for one in error.problems
        ) from None


def check_base(source: AdapterSource) -> None:
    """Check that the base model has the weights that the adapter was trained on; loads none.

    Raises:
        UserError: it has others.
    """
    recorded, folder = source.provenance.get("base_weights_sha256"), model_folder(source.model)
    found = weights_fingerprint(folder) if folder else None
    if recorded and found and found != recorded:
        problem = (
            f"was trained on other weights than those of {source.model.name} "
            f"(fingerprint {recorded[:12]} in {PROVENANCE}, {found[:12]} in the model)"
        )
        raise UserError(
            "--adapter", source.folder, problem, f"restore the model, or delete base_weights_sha256 from {PROVENANCE}"
        )


def load_checked_tokenizer(source: AdapterSource) -> "PreTrainedTokenizerBase":
    """Load the tokenizer and the chat template saved with the adapter, else the base model's.

    Raises:
        UserError: the tokenizer cannot be loaded, or has another vocabulary than in training.
    """
    tokenizer = load_tokenizer(source.tokenizer, source.chat_template)
    unknown = [number for number in source.stop_ids or () if tokenizer.convert_ids_to_tokens(number) is None]
    if unknown:
        problem = f"ends answers with token {unknown[0]} by its {PROVENANCE}, which the tokenizer does not have"
        raise UserError("--adapter", source.folder, problem, f"copy the tokenizer files and {PROVENANCE} again")
    recorded = source.provenance.get("tokenizer_sha256")
    if recorded and tokenizer_fingerprint(tokenizer) != recorded:
        # A later library may serialize the same tokenizer differently; the fingerprint of the vocabulary stays the same.
        vocabulary = source.provenance.get("vocabulary_sha256")
        if vocabulary is None:
            note = f"{source.folder}: the tokenizer differs from tokenizer_sha256 in {PROVENANCE} and may be another one"
            print(spell_out(note), file=sys.stderr)
        elif vocabulary != vocabulary_fingerprint(tokenizer):
            problem = f"was trained with another vocabulary than that of the tokenizer in {source.tokenizer.name}"
            remedy = f"copy the tokenizer files again ({PROVENANCE} has their vocabulary_sha256)"
            raise UserError("--adapter", source.folder, problem, remedy)
    return tokenizer
