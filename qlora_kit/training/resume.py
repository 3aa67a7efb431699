"""Which checkpoint to resume, and whether it may be."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_kit.config import Config
from qlora_kit.config_file import load_config
from qlora_kit.errors import Problem, UserError
from qlora_kit.output.checkpoints import MANIFEST, Checkpoint, InvalidCheckpoint, find_newest_valid, list_checkpoints
from qlora_kit.output.folder import ADAPTER_FILES, CHECKPOINTS, CONFIG, LOG, METRICS, NEW
from qlora_kit.output.new_run import choose_folder, finish
from qlora_kit.output.provenance import code_digest, versions
from qlora_kit.shipped import is_dispatched
from qlora_kit.training.processes import Team
from qlora_kit.untrusted import user_path

# The fingerprints that a resumed run must find unchanged: key and words of the message.
FINGERPRINTS = {
    "train_sha256": ("data.dataset", "the training data"),
    "eval_sha256": ("data.eval_split", "the evaluation data"),
    "tokenizer_sha256": ("model.name", "the tokenizer"),
    "template_sha256": ("data.chat_template", "the chat template"),
    "base_sha256": ("model.name", "the base weights"),
}
# Settings that a resumed run may change: they decide neither what is trained, nor on what, nor in which order.
MAY_CHANGE = (
    "training.output_dir", "training.num_epochs", "training.max_steps",
    "training.gradient_checkpointing", "training.logging_steps", "training.eval_steps", "training.save_steps",
    "training.save_total_limit", "training.early_stopping_patience", "training.keep_best", "training.max_skipped_steps",
    "training.sample_prompts", "training.report_to",
)  # fmt: skip
# Settings that say where something lies: they may change while its fingerprint stays.
PLACES = {
    "model.name": "base_sha256", "model.revision": "base_sha256", "data.dataset": "train_sha256", "data.subset": "train_sha256",
    "data.train_split": "train_sha256", "data.eval_split": "eval_sha256", "data.chat_template": "template_sha256",
}  # fmt: skip
# The files of a checkpoint that are read.
FILES = (*ADAPTER_FILES, CONFIG, LOG, METRICS, "trainer_state.json", "optimizer.pt", "scheduler.pt")


Count = Annotated[int, Field(ge=0, le=2**31)]
Size = Annotated[int, Field(ge=1, le=2**20)]


class GuardState(BaseModel, strict=True):
    """The result of StepGuard.state."""

    skipped: list[Count]
    losses: list[float]
    warned: list[str]


class BestState(BaseModel, strict=True):
    """The result of BestEvaluation.state."""

    step: Count | None
    loss: float | None
    without_improvement: Count


class RunFacts(BaseModel, strict=True):
    """The facts that a run writes into a manifest, so far as resuming reads it."""

    model_config = ConfigDict(extra="ignore")

    fingerprints: dict[str, str]
    versions: dict[str, str] = {}  # of an earlier version: none
    prompt_style: str
    not_packed: str | None = None
    plan_inputs: dict[str, Any]
    micro_batch: Size
    recomputed: Count
    processes: Size
    rows: Size
    guard: GuardState
    best: BestState | None
    loss_sum: float
    steps_to_log: Count


def check_run(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint holds what this version of the toolkit resumes from.

    Raises:
        InvalidCheckpoint: it does not.
    """
    if missing := [name for name in FILES if name not in checkpoint.files]:
        raise InvalidCheckpoint(f"{MANIFEST} does not list {missing[0]}")
    try:
        RunFacts.model_validate(checkpoint.run)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        reason = f"{MANIFEST} is of another version of this toolkit, or damaged (run.{place})"
        raise InvalidCheckpoint(reason) from None


def find_checkpoint(folder: Path, config: Config, wanted: str) -> tuple[Checkpoint, list[str]]:
    """Find the checkpoint to resume: the one named, or the newest valid one of the folder named, or of the output folder.

    Args:
        folder: where the run writes: the output folder, or .new in it.
        wanted: a checkpoint, a folder with checkpoints, or empty for the output folder's own.

    Returns:
        The checkpoint, and lines for the log: invalid checkpoints and why, and changed settings.

    Raises:
        UserError: there is none, or its run had settings that may not change.
    """
    named = user_path(wanted, "--resume") if wanted else folder / CHECKPOINTS
    if folder.name == NEW and named.resolve() in (folder.parent.resolve(), (folder.parent / CHECKPOINTS).resolve()):
        named = folder / CHECKPOINTS
    found = list_checkpoints(named) or list_checkpoints(named / CHECKPOINTS) or [named] * bool(wanted)
    checkpoint, invalid = find_newest_valid([path for path in found if path.is_dir()], check_run)
    if checkpoint is None:
        remedy = "start over with --overwrite, or use another folder"
        missing = Problem("--resume", wanted or folder / CHECKPOINTS, "has no checkpoint", remedy)
        remedy = "use another checkpoint, or start over with --overwrite"
        raise UserError.of([Problem("--resume", path, reason, remedy) for path, reason in invalid] or [missing])
    if checkpoint.folder.resolve().parent != (folder / CHECKPOINTS).resolve():
        problem = f"is not a checkpoint of a run in {folder}"
        raise UserError("--resume", checkpoint.folder, problem, "set --output_dir to the folder of its run")
    lines = [f"Skipped an invalid checkpoint: {path}: {reason}" for path, reason in invalid]
    lines.append(f"Resuming from step {checkpoint.step}: {checkpoint.folder}")
    return checkpoint, [*lines, *_check_identical_settings(checkpoint, config), *_describe_other_versions(checkpoint)]


def _describe_other_versions(checkpoint: Checkpoint) -> Iterator[str]:
    before = checkpoint.run.get("versions", {})
    for name, version in (versions() | {"code": code_digest()}).items():
        if before.get(name, version) != version:
            yield f"Another version since: {name} {version}, was {before[name]}"


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
            if value != old and checkpoint.run["fingerprints"].get(PLACES.get(dotted, "")):
                lines.append(f"Elsewhere since: {dotted}: {value}, was {old}; accepted with the same content only")
            elif value != old and fixed and dotted not in MAY_CHANGE:
                remedy = "set it back, or start over in another --output_dir"
                problems.append(Problem(dotted, str(value), f"differs from {old}, the value of the run to resume", remedy))
            elif value != old:
                lines.append(f"Changed since: {dotted}: {value}, was {old}")
    if problems:
        raise UserError.of(problems)
    return lines


def find_start(
    folder: Path, config: Config, wanted: str | None, overwrite: bool, team: Team
) -> tuple[Path, Checkpoint | None, list[str]]:
    """Find where a run writes and the checkpoint that it resumes, as rank 0 does, on all ranks.

    Args:
        wanted: as in find_checkpoint; None does not resume.

    Returns:
        The output folder, or .new in it; the checkpoint, or None; and lines for the log.

    Raises:
        UserError: as find_checkpoint, or another rank cannot see the checkpoint.
    """
    place, checkpoint, lines = folder, None, list[str]()
    if team.is_main:
        lines = finish(folder) if folder.is_dir() else []
        place = choose_folder(folder, wanted is not None, overwrite)
        if wanted is not None:
            checkpoint, notes = find_checkpoint(place, config, wanted)
            lines += notes
    place, checkpoint = team.broadcast((place, checkpoint))
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
    return place, checkpoint, lines


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


def command_again(argv: list[str], resume: str | None, team: Team, flag: str) -> str:
    """Return the command line that goes on with a stopped run, with --resume, or starts it again, with --overwrite."""
    dropped = ("--overwrite", "--resume", resume, f"--resume={resume}")
    again = [word for word in argv[1:] if word not in dropped]
    program = argv[0].split() if is_dispatched() else ["python", argv[0]]
    if team.count > 1:
        program[:1] = ["torchrun", f"--nproc_per_node={team.local_count}"]
    return shlex.join([*program, *again, flag]) + (", on each node" if team.local_count < team.count else "")
