"""Ctrl+C, SIGTERM, a closed terminal, and early stopping: finish the step, save, stop."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerState

from qlora_kit.errors import Stopped
from qlora_kit.output.checkpoints import newest_step
from qlora_kit.output.folder import CHECKPOINTS
from qlora_kit.output.place import has_begun
from qlora_kit.training.processes import ALONE, Team

SAME_REQUEST = 3.0  # seconds in which a launcher repeats to its processes the signal that the terminal has sent them
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopCallback(TrainerCallback):
    """Stop at a signal. The first one: say so at once, finish the optimizer step and save; the second: stop at once.

    A signal that was ignored when the run began, as nohup ignores SIGHUP, stays ignored. Several processes all stop after the
    same step, whichever received the signal.

    Args:
        checkpoints: the folder of the run's checkpoints.
        say: shows a line at once; a thread calls it.
    """

    def __init__(self, team: Team = ALONE, checkpoints: Path = Path(), say: Callable[[str], None] = print) -> None:
        self.team, self.checkpoints, self.say = team, checkpoints, say
        self.signal: int | None = None
        self._received = 0.0
        self._previous: dict[int, Any] = {}
        self._state = TrainerState()
        self._has_spoken = False
        self._stop_listening: Callable[[], None] = lambda: None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        again = self.signal is not None
        if again and self.team.count > 1 and time.monotonic() - self._received < SAME_REQUEST:
            return
        if again:
            raise KeyboardInterrupt(128 + number)
        self.signal, self._received = number, time.monotonic()

    def on_train_begin(self, args, state, control, **rest):
        self._state = state
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            self._stop_listening = self._listen()
            caught = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._remember) for number in caught}

    def _listen(self) -> Callable[[], None]:
        """Speak as soon as a signal arrives; return what ends that.

        Python calls a handler only between two instructions of the main thread, which may wait for the GPU as long as a step
        takes. The number of the signal is written to a pipe before, which a thread reads.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

        def listen() -> None:
            while number := os.read(reader, 1)[0]:
                if number in self._previous:
                    self._speak(number)

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()

        def stop() -> None:
            signal.set_wakeup_fd(before)
            os.write(writer, b"\0")  # which is no signal
            thread.join()
            os.close(reader)
            os.close(writer)

        return stop

    def _speak(self, number: int) -> None:
        if self._has_spoken:
            return
        self._has_spoken = True
        newest, state = newest_step(self.checkpoints), self._state
        lost = "everything since the start" if newest is None else f"the steps since checkpoint {newest}"
        name = "Ctrl+C" if number == signal.SIGINT else signal.Signals(number).name
        last = min(state.global_step + 1, state.max_steps or state.global_step + 1)
        with suppress(OSError):  # the terminal is closed
            self.say(f"Stopping after step {last} and saving. {name} again stops now and loses {lost}.")

    def on_step_end(self, args, state, control, **rest):
        self.signal = self.team.max(self.signal or 0) or None
        if self.signal is not None and not control.should_training_stop:
            control.should_save = True
            control.should_training_stop = True

    def release(self) -> None:
        """Restore the signal handlers of before.

        With several processes each keeps its handlers but that of Ctrl+C: when one has failed, the launcher sends SIGTERM to the
        others, and would cut off the line that says why.
        """
        for number, handler in self._previous.items():
            if number == signal.SIGINT or self.team.count == 1:
                signal.signal(number, handler)
        self._previous = {}
        self._stop_listening()
        self._stop_listening = lambda: None


@contextmanager
def explaining_interrupt(folder: Path) -> Iterator[None]:
    """Say what is lost when a run stops at once.

    Args:
        folder: where the run writes.

    Raises:
        Stopped: for a KeyboardInterrupt after the run has begun to write.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if not has_begun(folder):
            raise
        newest, status = newest_step(folder / CHECKPOINTS), next(iter(interrupt.args), 130)
        lost = "everything since the start is lost" if newest is None else f"what came after checkpoint {newest} is lost"
        raise Stopped(status, f"Stopped at once; {lost}.", can_resume=newest is not None) from None


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
