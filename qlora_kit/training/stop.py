"""When a run ends before its last step: Ctrl+C, SIGTERM."""

import signal
import time
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from qlora_kit.training.processes import ALONE, Team

SAME_REQUEST = 3.0  # seconds in which a launcher passes on to its processes what the terminal has sent them already


class StopCallback(TrainerCallback):
    """First Ctrl+C or SIGTERM: finish the optimizer step and save; second: stop at once.

    Of several processes all stop after the same step, whichever was asked to.
    """

    def __init__(self, team: Team = ALONE) -> None:
        self.team = team
        self.signal: int | None = None
        self._asked = 0.0
        self._previous: dict[int, Any] = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        again = self.signal is not None
        if again and self.team.count > 1 and time.monotonic() - self._asked < SAME_REQUEST:
            return
        if again:
            raise KeyboardInterrupt
        self.signal, self._asked = number, time.monotonic()

    def on_train_begin(self, args, state, control, **rest):
        self._previous = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(self, args, state, control, **rest):
        self.signal = self.team.max(self.signal or 0) or None
        if self.signal is not None and not control.should_training_stop:
            control.should_save = True
            control.should_training_stop = True

    def release(self) -> None:
        """Give the signals back to whoever had them before.

        Of several processes, each keeps SIGTERM: when one has failed, the launcher sends it to the others, and would cut off the
        line that says why.
        """
        for number, handler in self._previous.items():
            if number != signal.SIGTERM or self.team.count == 1:
                signal.signal(number, handler)
        self._previous = {}
