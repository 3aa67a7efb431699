"""A Trainer whose run can end at any moment and go on as if it had not: what a checkpoint holds, and how it is taken up again.

The library saves and loads adapter, optimizer, schedule, loss scaling and random numbers, and finds its place in the shuffled
data from the step. Here: files that are whole or not there (checkpoints.py), and what the library leaves out. Dropout of the fast
path follows from the step (fast/graph.py), so nothing of it is kept.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from transformers import EarlyStoppingCallback, Trainer, TrainerState

from qlora_kit.adapter.save import write_adapter
from qlora_kit.errors import UserError
from qlora_kit.fast.micro_step import MicroStep
from qlora_kit.model.device import is_out_of_memory
from qlora_kit.model.perplexity import Perplexity
from qlora_kit.output.checkpoints import find_newest_valid, read_checkpoint, rotate, staged_checkpoint
from qlora_kit.output.folder import CHECKPOINT_PREFIX, checkpoint_bytes
from qlora_kit.planning.plan import plan_inputs
from qlora_kit.training.processes import Team
from qlora_kit.training.progress import ProgressCallback
from qlora_kit.training.report import write_run_files
from qlora_kit.training.step_guard import StepGuard
from qlora_kit.training.stop import StopCallback

MOMENTS = ("state1", "state2")


class ResumableTrainer(Trainer):
    """What of QLoraTrainer has to do with checkpoints; the attributes are set there."""

    steps: int
    rows: int
    checkpoints_kept: int | None
    adapted: Any
    micro: MicroStep | None
    progress: ProgressCallback
    stopping: StopCallback
    guard: StepGuard
    team: Team
    last_measured: tuple[int, Perplexity] | None

    def train(self, resume_from_checkpoint=None, **rest):  # type: ignore[override]
        checkpoint = resume_from_checkpoint
        done = TrainerState()
        if checkpoint:
            with _taken_from(checkpoint, "manifest.json or trainer_state.json"):
                done = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
                run = read_checkpoint(Path(checkpoint)).run
                self._take_rows(run)
                self.guard.restore(run["guard"])
        if done.global_step < self.steps and not self._stopped_early(done):
            try:
                return super().train(resume_from_checkpoint=checkpoint, **rest)
            finally:  # also when it fails: no bar is left running, no signal caught
                self.progress.close()
                self.stopping.release()
        # Ended after its last step: nothing is left to train, and the library would take a step too many.
        self.state = done
        self._find_best()
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        weights = load_peft_weights(best or checkpoint, device=self.args.device.type)
        set_peft_model_state_dict(self.adapted, weights)

    # Saving

    def _save_checkpoint(self, model, trial) -> None:
        """All that resuming needs, under its name only when it is whole.

        Raises:
            Failed: the disk refuses it; the checkpoints before it stand.
        """
        root, state = self._root(), self.state
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(root / f"{CHECKPOINT_PREFIX}{state.global_step}")
        callbacks: Any = state.stateful_callbacks
        callbacks |= {type(one).__name__: one.state() for one in [*self._patience(), self.control]}
        about, random_numbers = self._about(), self.team.gather(self._random_numbers())
        if not self.team.is_main:
            return
        with staged_checkpoint(root, state.global_step, about, self._bytes()) as folder:
            self._save(str(folder))
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            for name, content in random_numbers:
                (folder / name).write_bytes(content)
            state.save_to_json(str(folder / "trainer_state.json"))
            write_run_files(self.progress.report, folder)
        rotate(root, self.checkpoints_kept, Path(state.best_model_checkpoint) if state.best_model_checkpoint else None)

    def _random_numbers(self) -> tuple[str, bytes]:
        """File name and content of this process's random state, as the library writes and finds it."""
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            (file,) = Path(folder).iterdir()
            return file.name, file.read_bytes()

    def _save(self, output_dir=None, state_dict=None) -> None:
        write_adapter(self.adapted, Path(str(output_dir)))  # the adapter alone: no pickled arguments

    def _root(self) -> Path:
        return Path(str(self.args.output_dir))

    def _bytes(self) -> float:
        trained = sum(parameter.numel() for parameter in self.adapted.parameters() if parameter.requires_grad)
        return checkpoint_bytes(trained, self.progress.report.config.training.optimizer_bytes)

    def _about(self) -> dict[str, Any]:
        """For the manifest: what neither the settings nor the library's files say."""
        report, measured = self.progress.report, self.last_measured
        return {
            "material": report.material,
            "prompt_style": report.data["prompt_style"],
            "asked": plan_inputs(report.config),
            "micro_batch": report.plan.micro_batch,
            "recomputed": report.plan.recomputed,
            "keep_weights": report.plan.keep_weights,
            "processes": self.team.count,
            "rows": self.rows,
            "guard": self.guard.state(),
            "loss_to_log": self._tr_loss.item(),  # of the steps since the last logged one
            "logged_step": self._globalstep_last_logged,
            "eval_loss": measured[1].loss if measured and measured[0] == self.state.global_step else None,
        }

    def _determine_best_metric(self, metrics, trial) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= is_best and self.args.load_best_model_at_end  # or there were nothing to go back to
        return is_best

    # Going on

    def _load_callback_state(self) -> None:
        """Called by the library when it has loaded `state`: what it would restore only together with settings of before."""
        self._find_best()
        for one in self._patience():
            one.early_stopping_patience_counter = _impatience(self.state)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        with _taken_from(resume_from_checkpoint, "adapter_model.safetensors"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        with _taken_from(checkpoint, "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint:
            self._follow_schedule()
        if checkpoint and self.args.device.type == "cuda":
            page_again(getattr(self.optimizer, "optimizer", self.optimizer))  # accelerate wraps it

    def _follow_schedule(self) -> None:
        """Take the next step's learning rate from the schedule as it is now.

        The loaded one is that of the schedule before: 0 at the end of a cosine, so that the first of more steps would be lost.
        """
        schedule: Any = self.lr_scheduler
        rates = [base * at(schedule.last_epoch) for base, at in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates  # what is logged

    def _load_scaler(self, checkpoint) -> None:
        with _taken_from(checkpoint, "scaler.pt"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint) -> None:
        """Also the losses since the last logged step, which the library would leave out of the next mean that it logs."""
        with _taken_from(checkpoint, "rng_state.pth"):
            super()._load_rng_state(checkpoint)
        run = read_checkpoint(Path(checkpoint)).run
        self._tr_loss = torch.tensor(run["loss_to_log"], device=self.args.device)
        self._globalstep_last_logged = run["logged_step"]

    def _take_rows(self, run: dict[str, Any]) -> None:
        """Begin with as few sequences at a time as the run to resume had come down to."""
        if run["micro_batch"] == self.rows and run["rows"] < self.rows:
            self.rows = self.progress.report.micro_batch = run["rows"]
            self.micro = self.micro and self.micro.smaller(self.rows)

    def _find_best(self) -> None:
        """Where the best checkpoint is now, if it is there and valid; else the best is what is evaluated from here on."""
        state, folder = self.state, self._root() / f"{CHECKPOINT_PREFIX}{self.state.best_global_step}"
        state.best_model_checkpoint = str(folder) if find_newest_valid([folder])[0] else None
        if state.best_model_checkpoint is None:
            state.best_metric = state.best_global_step = None

    def _patience(self) -> list[EarlyStoppingCallback]:
        return [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]

    def _stopped_early(self, done: TrainerState) -> bool:
        return any(_impatience(done) >= one.early_stopping_patience for one in self._patience())


@contextmanager
def _taken_from(checkpoint: str | None, name: str) -> Iterator[None]:
    """One line for a file that its manifest vouches for, and that yet no run of ours wrote. What it asks to run is not run.

    Raises:
        UserError: the library could not take the file's content.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, OSError):
            raise
        raise UserError(
            f"--resume {checkpoint}: {name} holds what no run has written ({type(error).__name__}), and nothing of it was run; "
            "name another checkpoint, or start anew with --overwrite"
        ) from error


def _impatience(state: TrainerState) -> int:
    """Evaluations without improvement up to a checkpoint; 0 where early stopping was off."""
    saved: Any = state.stateful_callbacks
    return saved.get("EarlyStoppingCallback", {}).get("attributes", {}).get("early_stopping_patience_counter", 0)


def page_again(optimizer: Any, allocate: Callable[..., torch.Tensor] | None = None) -> int:
    """Move loaded moments into paged memory, by bitsandbytes' own rule: of a paged optimizer, from 100,000 elements on.

    Args:
        optimizer: any; one that is not paged is left alone.
        allocate: (*shape, dtype, device) -> a tensor with `is_paged`; bitsandbytes' own by default, which needs a GPU.

    Returns:
        How many tensors were moved.
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
            if value is None or value.numel() < 1e5 or getattr(value, "is_paged", False):
                continue
            paged = allocate(*value.shape, dtype=value.dtype, device=parameter.device)
            paged.copy_(value)
            optimizer.page_mng.paged_tensors.append(paged)
            state[name] = paged
            moved += 1
    return moved
