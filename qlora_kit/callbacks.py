"""When a run ends before its last step: Ctrl+C, SIGTERM."""

import signal
from types import FrameType
from typing import Any

from transformers import TrainerCallback


class StopCallback(TrainerCallback):
    """First Ctrl+C or SIGTERM: finish the optimizer step and save; second: stop at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def on_train_begin(self, args, state, control, **rest):
        self._previous = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(self, args, state, control, **rest):
        if self.signal is not None and not control.should_training_stop:
            control.should_save = True
            control.should_training_stop = True

    def release(self) -> None:
        """Give the signals back to whoever had them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
