"""Which checkpoint to resume, and whether it may be."""

from pathlib import Path
from typing import Any

from qlora_kit.config import Config
from qlora_kit.config_file import load_config
from qlora_kit.errors import UserError
from qlora_kit.output.checkpoints import MANIFEST, Checkpoint, clean, find_newest_valid, list_checkpoints
from qlora_kit.output.folder import CHECKPOINTS, CONFIG
from qlora_kit.training.processes import Team

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


def find_checkpoint(folder: Path, config: Config, wanted: str) -> tuple[Checkpoint, list[str]]:
    """The checkpoint to go on from: the one named, or the newest valid one of the folder named, or of the output folder.

    Returns:
        It, and lines for the log: the checkpoints passed over and why, the settings that changed and may.

    Raises:
        UserError: there is none, or the settings are not those of the run that wrote it.
    """
    named = Path(wanted).expanduser() if wanted else folder / CHECKPOINTS
    found = list_checkpoints(named) or list_checkpoints(named / CHECKPOINTS) or [named] * bool(wanted)
    checkpoint, passed_over = find_newest_valid([path for path in found if path.is_dir()])
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
    if team.is_main:
        clean(folder / CHECKPOINTS)
        if wanted is not None:
            checkpoint, lines = find_checkpoint(folder, config, wanted)
    checkpoint = team.broadcast(checkpoint)
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


def check_end(checkpoint: Checkpoint, config: Config, blocks: int) -> None:
    """Refuse to resume behind the end: adapter, settings and provenance would speak of different runs.

    Raises:
        UserError: the checkpoint has more steps than the settings ask for.
    """
    if checkpoint.step > (steps := config.total_steps(blocks)):
        key = "max_steps" if config.training.max_steps else "num_epochs"
        raise UserError(
            f"training.{key}: {getattr(config.training, key)}: ends the run at step {steps}, and {checkpoint.folder} is of step "
            f"{checkpoint.step}; raise it, name an earlier checkpoint behind --resume, or start anew in another --output_dir"
        )
