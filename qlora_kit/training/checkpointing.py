"""Save and resume checkpoints of the Trainer.

The Hugging Face Trainer writes optimizer, schedule, loss scaling, random state and its own state into a staging folder, and
reads them back. Here: the rest of a checkpoint, its completion by one rename, and what the library leaves out when it resumes.
Dropout of the fast path follows from the step (fast/micro_step.py), so nothing of it is kept.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import load_peft_weights, set_peft_model_state_dict

from qlora_kit.errors import UserError
from qlora_kit.model.perplexity import Perplexity, recorded_base
from qlora_kit.output.checkpoints import Checkpoint, find_newest_valid, rotate, staged_checkpoint
from qlora_kit.output.folder import CHECKPOINT_PREFIX, SAVING, checkpoint_bytes
from qlora_kit.output.metrics import read_metrics
from qlora_kit.training.processes import Team

MOMENTS = ("state1", "state2")  # bitsandbytes' names of Adam's two moments
PAGED_FROM = 1e5  # elements: bitsandbytes pages no smaller state


class CheckpointStore:
    """The checkpoints of a run. Rank 0 writes; every process takes part in `complete`.

    Args:
        root: the folder of all checkpoints.
        kept: how many to keep; None keeps all.
        facts: what every manifest says of the run, as JSON: what resuming must find unchanged.
        optimizer_bytes: of optimizer state for each trained parameter.
        write_run_files: writes settings and log into a checkpoint's folder.
    """

    def __init__(
        self,
        root: Path,
        team: Team,
        kept: int | None,
        facts: dict[str, Any],
        optimizer_bytes: float,
        write_run_files: Callable[[Path], None],
    ):
        self.root, self.team, self.kept, self.facts = root, team, kept, facts
        self.optimizer_bytes, self.write_run_files = optimizer_bytes, write_run_files
        self.transaction = ExitStack()  # of the checkpoint that is being written; an exception within it removes the checkpoint

    @property
    def staging(self) -> Path:
        """The folder in which the library writes `checkpoint-N`."""
        return self.root / SAVING

    def begin(self, step: int, state: dict[str, Any], parameters: int) -> Path:
        """Create the staging folder of a checkpoint.

        Args:
            state: of the Trainer at this step, as JSON, for the manifest.
            parameters: that are trained.

        Raises:
            Failed: the disk has no room for it, or refuses it.
        """
        folder = self.staging / f"{CHECKPOINT_PREFIX}{step}"
        if self.team.is_main:
            size = checkpoint_bytes(parameters, self.optimizer_bytes)
            opened = self.transaction.enter_context(staged_checkpoint(self.root, step, self.facts | state, size))
            assert opened == folder, "the library writes elsewhere"
        self.team.gather(None)  # no process writes before rank 0 has emptied the folder
        return folder

    def complete(self, step: int, best: int | None) -> None:
        """Give the checkpoint its name, now that everything is written, and delete the ones that are too many.

        Args:
            best: the step whose checkpoint stays in any case.
        """
        folder = self.staging / f"{CHECKPOINT_PREFIX}{step}"
        random_states = self.team.gather([(path.name, path.read_bytes()) for path in folder.glob("rng_state*.pth")])
        if not self.team.is_main:
            return
        for name, content in (file for files in random_states for file in files):
            (folder / name).write_bytes(content)  # another node may have no access to this disk
        self.write_run_files(folder)
        self.transaction.close()
        self.rotate(step, best)

    def rotate(self, *steps: int | None) -> None:
        """Delete the checkpoints that are too many; those of `steps` stay in any case."""
        if self.team.is_main:
            rotate(self.root, self.kept, *(self.folder(step) for step in steps if step is not None))

    def folder(self, step: int) -> Path:
        return self.root / f"{CHECKPOINT_PREFIX}{step}"

    def is_valid(self, step: int | None) -> bool:
        return step is not None and find_newest_valid([self.folder(step)])[0] is not None


def load_adapter_weights(model: Any, folder: Path, device: str) -> None:
    """Copy the adapter of a checkpoint into a PEFT model, in place."""
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device=device))


def unreadable(checkpoint: Checkpoint, error: Exception) -> UserError:
    """Return the error for a file that the manifest vouches for, and that no run has written; nothing in it was executed."""
    reason = " ".join(str(error).split())[:100]
    problem = f"cannot be loaded ({type(error).__name__}: {reason}): a file of it holds what no run has written"
    return UserError("--resume", checkpoint.folder, problem, "use another checkpoint, or start over with --overwrite")


def read_base(checkpoint: Checkpoint) -> Perplexity | None:
    """Return the base model's perplexity that a checkpoint's metrics.jsonl records, None if it was not measured.

    Raises:
        UserError: the file holds what no run has written.
    """
    try:
        return recorded_base(read_metrics(checkpoint.folder))
    except Exception as error:
        raise unreadable(checkpoint, error) from error


def follow_schedule(schedule: Any) -> None:
    """Take the next step's learning rate from the schedule as the settings define it now.

    The loaded rate is that of the schedule before: 0 at the end of a cosine, so that the first added step would train nothing.
    """
    rates = [base * at(schedule.last_epoch) for base, at in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates  # the Trainer logs this one


def move_state_to_paged_memory(optimizer: Any, allocate: Callable[..., torch.Tensor] | None = None) -> int:
    """Move loaded moments into paged memory, which CUDA moves between GPU and host, so that they cannot fill the GPU.

    bitsandbytes (0.50) allocates them paged at the first step, but loading a checkpoint puts them on the GPU for good.

    Args:
        optimizer: any optimizer; one that is not paged is left alone.
        allocate: (*shape, dtype, device) -> a tensor with `is_paged`; bitsandbytes' own by default, which needs a GPU.

    Returns:
        The number of tensors moved.
    """
    if not getattr(optimizer, "is_paged", False):
        return 0
    if allocate is None:
        from bitsandbytes.functional import get_paged

        allocate = get_paged
    moved = 0
    for parameter, state in optimizer.state.items():
        for name in MOMENTS:
            value = state.get(name)
            if value is None or value.numel() < PAGED_FROM or getattr(value, "is_paged", False):
                continue
            paged = allocate(*value.shape, dtype=value.dtype, device=parameter.device)
            paged.copy_(value)
            optimizer.page_mng.paged_tensors.append(paged)
            state[name] = paged
            moved += 1
    return moved
