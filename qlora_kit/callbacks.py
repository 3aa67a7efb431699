"""When a run ends before its last step: a loss that is no number, Ctrl+C, SIGTERM."""

import math
import signal
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from qlora_kit.cli import Failed


class FiniteLossCallback(TrainerCallback):
    """Stop at the first logged loss that is NaN or infinite instead of training on.

    The Trainer's closing `train_loss`, the mean of the whole run, tells of the steps after the last logged one.
    """

    def on_log(self, args, state, control, logs=None, **rest):
        loss = (logs or {}).get("loss", (logs or {}).get("train_loss", 0.0))
        if not math.isfinite(loss):
            raise Failed(
                f"the loss is {loss} at step {state.global_step}; the run was stopped and no adapter written: "
                f"try a lower --learning_rate (now {args.learning_rate}), or quantization.compute_dtype bfloat16 or float32"
            )


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
