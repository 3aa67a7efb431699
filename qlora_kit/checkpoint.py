"""The output folder of a run: may it be written, what does it hold, where to go on from, and how results are put into it.

A file that marks a run as finished (the adapter's weights) is moved into place last, so that it is whole or absent.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import Config
from qlora_kit.config_file import load_config
from qlora_kit.errors import Failed, UserError
from qlora_kit.output.checkpoints import (
    MANIFEST,
    MIB,
    PREFIX,
    REPLACED,
    SAVING,
    Checkpoint,
    candidates,
    checkpoint_bytes,
    clean,
    flush,
    missing_bytes,
    newest_valid,
    refused_by_the_disk,
)
from qlora_kit.output.log import CURVES, LOG, METRICS
from qlora_kit.processes import Team
from qlora_kit.training.report import RunReport

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


CONFIG, PASSPORT, CHECKPOINTS = "config.yaml", "run.json", "checkpoints"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
OUTPUT_FILES = (*ADAPTER_FILES, LOG, METRICS, CURVES, CONFIG, PASSPORT)  # --overwrite removes these and the checkpoints
TOKENIZER_BYTES = 16 * MIB  # Qwen's is 11 MiB; the log and the curves are small
MATERIAL = {
    "train_sha256": "data.dataset: the training data is",
    "tokenizer_sha256": "model.name: the tokenizer is",
    "base_sha256": "model.name: the base weights are",
}
# Settings that a resumed run may change: they decide neither what is trained, nor on what, nor in which order.
MAY_CHANGE = (
    "data.max_eval_samples", "training.output_dir", "training.num_epochs", "training.max_steps",
    "training.gradient_checkpointing", "training.logging_steps", "training.eval_steps", "training.save_steps",
    "training.save_total_limit", "training.early_stopping_patience", "training.keep_best", "training.max_skipped_steps",
    "training.report_to",
)  # fmt: skip


def check_output_dir(name: str, overwrite: bool, resume: bool) -> Path:
    """The output folder, when a run may write there. Creates and removes nothing.

    Raises:
        UserError: it cannot be written, or holds a run that was neither to be resumed nor overwritten.
    """
    folder = Path(name).expanduser()
    key = f"training.output_dir: {name}"
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{key}: {existing} is a file, not a folder; name another --output_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{key}: cannot be written; change its permissions or name another --output_dir")
    begun = [*folder.glob(f"{CHECKPOINTS}/{PREFIX}*"), *folder.glob(f"{CHECKPOINTS}/{REPLACED}*")]
    finished, unfinished = (folder / ADAPTER_FILES[0]).exists(), bool(begun)
    if not resume and not overwrite and (finished or unfinished):
        what = "a finished adapter" if finished else "an unfinished run"
        raise UserError(
            f"{key}: already holds {what}; continue it with --resume, replace it with --overwrite, or name another --output_dir"
        )
    return folder


def find_checkpoint(folder: Path, config: Config, wanted: str) -> tuple[Checkpoint, list[str]]:
    """The checkpoint to go on from: the one named, or the newest valid one of the folder named, or of the output folder.

    Returns:
        It, and lines for the log: the checkpoints passed over and why, the settings that changed and may.

    Raises:
        UserError: there is none, or the settings are not those of the run that wrote it.
    """
    named = Path(wanted).expanduser() if wanted else folder / CHECKPOINTS
    found = candidates(named) or candidates(named / CHECKPOINTS) or [named] * bool(wanted)
    checkpoint, passed_over = newest_valid([path for path in found if path.is_dir()])
    lines = [f"Passed over, not valid: {line}" for line in passed_over]
    if checkpoint is None:
        problem = (
            f"--resume: no checkpoint in {wanted or folder / CHECKPOINTS}; start without --resume, or name a checkpoint folder"
        )
        invalid = [f"--resume: {line}; name another checkpoint, or start anew with --overwrite" for line in passed_over]
        raise UserError(*invalid or [problem])
    if checkpoint.folder.absolute().parents[1] != folder.absolute():
        raise UserError(
            f"--resume {checkpoint.folder}: is no checkpoint of a run in {folder}; name the folder of its run as --output_dir"
        )
    lines.append(f"Going on from step {checkpoint.step}: {checkpoint.folder}")
    return checkpoint, lines + _check_same_run(checkpoint, config)


def _check_same_run(checkpoint: Checkpoint, config: Config) -> list[str]:
    """Refuse to resume when a setting changed that decides what is trained, on what, or in which order.

    Returns:
        A line for each setting that changed and may.

    Raises:
        UserError: one problem for each such key.
    """
    before, problems, lines = load_config(checkpoint.folder / CONFIG).model_dump(), [], []
    for section, values in config.model_dump().items():
        for key, value in values.items():
            dotted, old = f"{section}.{key}", before[section][key]
            fixed = section not in ("performance", "generation") or dotted == "performance.fused_lora"
            if value != old and fixed and dotted not in MAY_CHANGE:
                problems.append(
                    f"{dotted}: {value}: the run to resume has {old}; set it back, or start anew in another --output_dir"
                )
            elif value != old:
                lines.append(f"Changed since: {dotted}: {value}, was {old}")
    if problems:
        raise UserError(*problems)
    return lines


def find_common_checkpoint(folder: Path, config: Config, wanted: str | None, team: Team) -> tuple[Checkpoint | None, list[str]]:
    """Where to go on from, as the first process finds it, and lines for the log.

    Raises:
        UserError: as find_checkpoint, or another process does not see it.
    """
    checkpoint: Checkpoint | None = None
    lines: list[str] = []
    if team.leads:
        clean(folder / CHECKPOINTS)
        if wanted is not None:
            checkpoint, lines = find_checkpoint(folder, config, wanted)
    checkpoint = team.told(checkpoint)
    if checkpoint:
        seen = team.gather((checkpoint.folder / MANIFEST).is_file())
        if not all(seen):
            raise UserError(
                f"--resume: {checkpoint.folder}: rank {seen.index(False)} does not see it; all nodes must see the output folder, "
                "or have a copy of its checkpoint at the same place"
            )
        if (before := checkpoint.run["processes"]) != team.count:
            lines.append(f"Going on with {team.count} processes what {before} began: the same data in the same order")
    return checkpoint, lines


def check_same_material(checkpoint: Checkpoint, material: dict[str, Any]) -> None:
    """Refuse to resume on other data, with another tokenizer or on other base weights, although the settings name the same.

    Args:
        material: what is there now, as far as it is known: keys of MATERIAL -> fingerprints.

    Raises:
        UserError: one problem for each that changed.
    """
    changed = [name for name, value in material.items() if checkpoint.run["material"].get(name) != value]
    remedy = "not what the run to resume was trained on; bring it back, or start anew in another --output_dir"
    if changed:
        raise UserError(*(f"{MATERIAL[name]} {remedy}" for name in changed))


def check_disk(folder: Path, parameters: int, optim: str) -> None:
    """Refuse a run whose first checkpoint and adapter would not fit on the disk.

    Args:
        parameters: of the adapter.

    Raises:
        UserError: with what is missing.
    """
    needed = checkpoint_bytes(parameters, optim) + 4.0 * parameters + TOKENIZER_BYTES
    missing = missing_bytes(folder, needed)
    if missing > 0:
        raise UserError(
            f"training.output_dir: {folder}: {missing / MIB:,.0f} MiB are missing on that disk of the {needed / MIB:,.0f} that a "
            "checkpoint and the adapter take; make room, or name another --output_dir"
        )


def write_run_files(report: RunReport, checkpoint: Path) -> None:
    """What a resumed run has to find as it was at this step: the settings, and the log with its numbers."""
    (checkpoint / CONFIG).write_text(report.config.to_yaml(), encoding="utf-8")
    report.log.copy_to(checkpoint)


def save_adapter(model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write the PEFT adapter and the tokenizer beside their place, then move them in, the weights last.

    Raises:
        Failed: as write_adapter, or the disk refuses it.
    """
    size = 4.0 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) + TOKENIZER_BYTES
    with (
        refused_by_the_disk("the adapter", folder, size),
        tempfile.TemporaryDirectory(dir=folder, prefix=SAVING) as staging,
    ):
        write_adapter(model, Path(staging))
        tokenizer.save_pretrained(staging)
        for file in sorted(Path(staging).iterdir(), key=lambda path: path.name == ADAPTER_FILES[0]):
            flush(file)
            if file.is_dir():  # a tokenizer with several chat templates has a folder of them, and no folder replaces another
                shutil.rmtree(folder / file.name, ignore_errors=True)
            os.replace(file, folder / file.name)
        flush(folder)


def write_adapter(model: "PeftModel", folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors; no room on the GPU is taken for it.

    peft copies tensors that share memory, as those of fast/adapters.py do, where they lie: it is given copies. Without
    save_embedding_layers=False it asks the Hub for the base model's vocabulary.

    Raises:
        Failed: the last update made the adapter infinite or NaN.
    """
    weights = {name: parameter.data.cpu() for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not all(value.isfinite().all() for value in weights.values()):
        raise Failed("the adapter holds values that are no numbers, so it was not written: try a lower --learning_rate")
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card is a form to fill in
