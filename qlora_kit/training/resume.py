"""Which checkpoint to resume, and whether it may be."""

import shlex
from pathlib import Path

from qlora_kit.config import Config
from qlora_kit.config_file import load_config
from qlora_kit.errors import Problem, UserError
from qlora_kit.output.checkpoints import MANIFEST, Checkpoint, clean, find_newest_valid, list_checkpoints
from qlora_kit.output.folder import CHECKPOINTS, CONFIG
from qlora_kit.training.processes import Team

# The fingerprints that a resumed run must find unchanged: key and words of the message.
FINGERPRINTS = {
    "train_sha256": ("data.dataset", "the training data"),
    "tokenizer_sha256": ("model.name", "the tokenizer"),
    "template_sha256": ("data.chat_template", "the chat template"),
    "base_sha256": ("model.name", "the base weights"),
}
# Settings that a resumed run may change: they decide neither what is trained, nor on what, nor in which order.
MAY_CHANGE = (
    "data.max_eval_samples", "training.output_dir", "training.num_epochs", "training.max_steps",
    "training.gradient_checkpointing", "training.logging_steps", "training.eval_steps", "training.save_steps",
    "training.save_total_limit", "training.early_stopping_patience", "training.keep_best", "training.max_skipped_steps",
    "training.report_to",
)  # fmt: skip


def find_checkpoint(folder: Path, config: Config, wanted: str) -> tuple[Checkpoint, list[str]]:
    """Find the checkpoint to resume: the one named, or the newest valid one of the folder named, or of the output folder.

    Args:
        folder: the output folder.
        wanted: a checkpoint, a folder with checkpoints, or empty for the output folder's own.

    Returns:
        The checkpoint, and lines for the log: invalid checkpoints and why, and changed settings.

    Raises:
        UserError: there is none, an earlier version wrote it, or its run had settings that may not change.
    """
    named = Path(wanted).expanduser() if wanted else folder / CHECKPOINTS
    found = list_checkpoints(named) or list_checkpoints(named / CHECKPOINTS) or [named] * bool(wanted)
    checkpoint, invalid = find_newest_valid([path for path in found if path.is_dir()])
    if checkpoint is None:
        missing = Problem(
            "--resume", wanted or folder / CHECKPOINTS, "has no checkpoint", "remove --resume, or use another folder"
        )
        remedy = "use another checkpoint, or start over with --overwrite"
        raise UserError.of([Problem("--resume", path, reason, remedy) for path, reason in invalid] or [missing])
    if checkpoint.folder.absolute().parents[1] != folder.absolute():
        problem = f"is not a checkpoint of a run in {folder}"
        raise UserError("--resume", checkpoint.folder, problem, "set --output_dir to the folder of its run")
    if "fingerprints" not in checkpoint.run:
        problem = "was written by an earlier version of this toolkit"
        raise UserError("--resume", checkpoint.folder, problem, "resume it with that version, or start over with --overwrite")
    lines = [f"Skipped an invalid checkpoint: {path}: {reason}" for path, reason in invalid]
    lines.append(f"Resuming from step {checkpoint.step}: {checkpoint.folder}")
    return checkpoint, lines + _check_identical_settings(checkpoint, config)


def _check_identical_settings(checkpoint: Checkpoint, config: Config) -> list[str]:
    """Refuse to resume when a setting changed that decides what is trained, on what, or in which order.

    Returns:
        A line for each setting that changed and may.

    Raises:
        UserError: one problem for each setting that may not.
    """
    before, problems, lines = load_config(checkpoint.folder / CONFIG).model_dump(), [], []
    for section, values in config.model_dump().items():
        for key, value in values.items():
            dotted, old = f"{section}.{key}", before[section][key]
            fixed = section not in ("performance", "generation") or dotted == "performance.fused_lora"
            if value != old and fixed and dotted not in MAY_CHANGE:
                remedy = "set it back, or start over in another --output_dir"
                problems.append(Problem(dotted, str(value), f"differs from {old}, the value of the run to resume", remedy))
            elif value != old:
                lines.append(f"Changed since: {dotted}: {value}, was {old}")
    if problems:
        raise UserError.of(problems)
    return lines


def find_common_checkpoint(folder: Path, config: Config, wanted: str | None, team: Team) -> tuple[Checkpoint | None, list[str]]:
    """Find the checkpoint to resume, as rank 0 does, on all ranks; returns it and lines for the log.

    Args:
        wanted: as in find_checkpoint; None does not resume.

    Raises:
        UserError: as find_checkpoint, or another rank cannot see the checkpoint.
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
                "--resume",
                checkpoint.folder,
                f"cannot be seen by rank {seen.index(False)}",
                "give all nodes the same output folder, or a copy of the checkpoint at the same path",
            )
        if (before := checkpoint.run["processes"]) != team.count:
            lines.append(f"Resuming with {team.count} processes a run of {before}: the same data in the same order")
    return checkpoint, lines


def check_fingerprints(checkpoint: Checkpoint | None, fingerprints: dict[str, str]) -> None:
    """Refuse to resume with other data, base weights, tokenizer or chat template, although the settings name the same.

    Args:
        checkpoint: None where the run does not resume.
        fingerprints: the current ones, as far as they are known: keys of FINGERPRINTS.

    Raises:
        UserError: one problem for each that changed.
    """
    if checkpoint is None:
        return
    before = checkpoint.run["fingerprints"]  # those of an earlier version have no template
    changed = [name for name, value in fingerprints.items() if before.get(name, value) != value]
    remedy = "restore them, or start over in another --output_dir"
    if changed:
        named = [FINGERPRINTS[name] for name in changed]
        raise UserError.of(Problem(key, None, f"{what} differ from those of the run to resume", remedy) for key, what in named)


def check_end(checkpoint: Checkpoint | None, config: Config, blocks: int) -> None:
    """Refuse to resume beyond the end: adapter, settings and run.json would describe different runs.

    Raises:
        UserError: the checkpoint has more steps than the settings allow.
    """
    if checkpoint and checkpoint.step > (steps := config.total_steps(blocks)):
        key = "max_steps" if config.training.max_steps else "num_epochs"
        raise UserError(
            f"training.{key}",
            getattr(config.training, key),
            f"ends the run at step {steps}, before {checkpoint.folder}",
            "raise it, resume an earlier checkpoint, or start over in another --output_dir",
        )


def resume_command(argv: list[str], resume: str | None, team: Team) -> str:
    """Return the command line that resumes a stopped run: the same one with --resume."""
    dropped = ("--overwrite", "--resume", resume, f"--resume={resume}")
    again = [word for word in argv[1:] if word not in dropped]
    launcher = ["python"] if team.count == 1 else ["torchrun", f"--nproc_per_node={team.local_count}"]
    return shlex.join([*launcher, argv[0], *again, "--resume"]) + (", on each node" if team.local_count < team.count else "")
