"""Ctrl+C, SIGTERM and early stopping: finish the step, save, stop."""

import math
import signal
import time
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from qlora_kit.training.processes import ALONE, Team

SAME_REQUEST = 3.0  # seconds in which a launcher repeats to its processes the signal that the terminal has sent them


class StopCallback(TrainerCallback):
    """Stop at a signal. First Ctrl+C or SIGTERM: finish the optimizer step and save; second: stop at once.

    Several processes all stop after the same step, whichever received the signal.
    """

    def __init__(self, team: Team = ALONE) -> None:
        self.team = team
        self.signal: int | None = None
        self._received = 0.0
        self._previous: dict[int, Any] = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        again = self.signal is not None
        if again and self.team.count > 1 and time.monotonic() - self._received < SAME_REQUEST:
            return
        if again:
            raise KeyboardInterrupt
        self.signal, self._received = number, time.monotonic()

    def on_train_begin(self, args, state, control, **rest):
        self._previous = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(self, args, state, control, **rest):
        self.signal = self.team.max(self.signal or 0) or None
        if self.signal is not None and not control.should_training_stop:
            control.should_save = True
            control.should_training_stop = True

    def release(self) -> None:
        """Restore the signal handlers of before.

        With several processes each keeps its SIGTERM handler: when one has failed, the launcher sends SIGTERM to the others, and
        would cut off the line that says why.
        """
        for number, handler in self._previous.items():
            if number != signal.SIGTERM or self.team.count == 1:
                signal.signal(number, handler)
        self._previous = {}


class BestEvaluation(TrainerCallback):
    """Remember the step of the lowest evaluation loss and save it; stop after `patience` evaluations without a lower one.

    The Trainer's own best checkpoint and EarlyStoppingCallback are restored only together with the settings of before, and lose
    the best checkpoint of a run that moved.
    """

    def __init__(self, patience: int | None):
        self.patience = patience
        self.step: int | None = None
        self.loss = math.inf
        self.without_improvement = 0  # evaluations; counted only with a patience

    def state(self) -> dict[str, Any]:
        """Return the state as JSON for a checkpoint."""
        loss = None if self.step is None else self.loss
        return {"step": self.step, "loss": loss, "without_improvement": self.without_improvement}

    def restore(self, state: dict[str, Any] | None, best_exists: bool) -> None:
        """Take up a checkpoint's state; where the best checkpoint is gone, the best is chosen among what comes."""
        if state is None:
            return
        self.without_improvement = state["without_improvement"]
        if best_exists:
            self.step, self.loss = state["step"], state["loss"]

    @property
    def is_over(self) -> bool:
        """True when early stopping ends the run."""
        return self.patience is not None and self.without_improvement >= self.patience

    def on_evaluate(self, args, state, control, metrics=None, **rest):
        if metrics["eval_loss"] < self.loss:
            self.step, self.loss, self.without_improvement = state.global_step, metrics["eval_loss"], 0
            control.should_save = True  # or there would be nothing to restore
        elif self.patience is not None:
            self.without_improvement += 1
        control.should_training_stop |= self.is_over
