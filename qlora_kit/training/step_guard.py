"""Check each step before the optimizer applies it: NaN, loss spikes, LoRA matrices without gradient.

A step whose loss or gradient is infinite or NaN ends the run, or is skipped: then its number and its place in the schedule are
used up, and adapter and optimizer keep their values. Each of the two warnings is given once in a run. Checkpoints keep the
guard's state, so that a resumed run judges as the uninterrupted one does.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from qlora_kit.config import TrainingSettings
from qlora_kit.errors import Failed

# A loss spike: above the median of the last WINDOW steps by ten robust standard deviations, and by a nat, which is e times
# the perplexity. 1.4826 times the median absolute deviation is one standard deviation of normally distributed values.
WINDOW, MIN_STEPS = 50, 20
DEVIATIONS, NAT = 10 * 1.4826, 1.0
FIRST_STEPS = 2  # in which a B without gradient is normal
MAX_NUMBERS = 20  # in one line


class StepFacts(Protocol):
    """Descriptions for the guard's messages, computed only for a message."""

    def describe_batch(self) -> str:
        """Return the blocks and records that the step was computed on."""

    def describe_checkpoints(self) -> str:
        """Return what the run leaves on disk if it ends here."""

    def modules_without_gradient(self) -> Sequence[str]:
        """Return the names of the modules whose LoRA B has a gradient of exactly zero."""


class StepGuard:
    """Decide whether the optimizer may apply a step; steps count from 1.

    Args:
        settings: for max_skipped_steps and learning_rate.
        dtype_name: of the computation, such as bfloat16.
        warn: prints a line.
    """

    def __init__(self, settings: TrainingSettings, dtype_name: str, warn: Callable[[str], None], facts: StepFacts):
        self.settings, self.dtype_name, self.warn, self.facts = settings, dtype_name, warn, facts
        self.skipped: list[int] = []
        self.losses: list[float] = []  # nats a token, of the last steps
        self.warned: list[str] = []

    def state(self) -> dict[str, Any]:
        """Return the guard's state as JSON for a checkpoint; float to text and back is exact."""
        return {"skipped": self.skipped, "losses": self.losses, "warned": self.warned}

    def restore(self, state: dict[str, Any]) -> None:
        self.skipped, self.losses, self.warned = (list(state[name]) for name in ("skipped", "losses", "warned"))

    def passes(
        self, step: int, loss: torch.Tensor, norm: torch.Tensor, smallest: torch.Tensor, loss_scale: Callable[[], float] | None
    ) -> bool:
        """Return whether the optimizer may apply the step; waits for the GPU, once.

        Args:
            loss: of the step, nats a token, ().
            norm: of the gradient before clipping, ().
            smallest: the smallest, over all LoRA B, of the largest absolute value of their gradient, ().
            loss_scale: reads float16's loss scale; None without one.

        Raises:
            Failed: the loss or the norm is infinite or NaN, and training.max_skipped_steps are used up.
        """
        loss_value, norm_value, smallest_value = torch.stack([x.float().to(loss.device) for x in (loss, norm, smallest)]).tolist()
        if not math.isfinite(loss_value):
            return self._skip(step, f"the loss is {loss_value}")
        if not math.isfinite(norm_value):
            # In float16 the library's loss scaling skips such a step by itself, and halves its scale.
            return (loss_scale is not None and loss_scale() >= 1) or self._skip(step, f"the gradient norm is {norm_value}")
        self._watch_loss(step, loss_value)
        if step > FIRST_STEPS and smallest_value == 0:
            names = self.facts.modules_without_gradient()
            which = f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
            effect = "it learns nothing; see lora.target_modules, or quantization.compute_dtype if that is float16"
            self._warn_once("zero gradient", f"the gradient of {which} is exactly zero at step {step}: {effect}")
        return True

    def _skip(self, step: int, problem: str) -> bool:
        allowed = self.settings.max_skipped_steps
        where = f"{problem} at step {step} ({self.facts.describe_batch()}, computed in {self.dtype_name})"
        if len(self.skipped) < allowed:
            self.skipped.append(step)
            left = allowed - len(self.skipped)
            self.warn(f"warning: {where}: the step is skipped; {left} more may be (training.max_skipped_steps)")
            return False
        raise Failed(
            f"{where}: stopped before the optimizer applied it, and no adapter was written; {self.advice()}; "
            f"training.max_skipped_steps={allowed + 1} skips the step; {self.facts.describe_checkpoints()}"
        )

    def advice(self) -> str:
        """Return the remedy for NaN or infinity, by the dtype of the run."""
        rate = f"a lower --learning_rate (now {self.settings.learning_rate})"
        wider = {"float16": ", or quantization.compute_dtype bfloat16 or float32", "bfloat16": ", or compute_dtype float32"}
        return f"try {rate}{wider.get(self.dtype_name, '')}"

    def _watch_loss(self, step: int, loss: float) -> None:
        if len(self.losses) >= MIN_STEPS:
            median = statistics.median(self.losses)
            deviation = statistics.median(abs(one - median) for one in self.losses)
            if loss > median + max(DEVIATIONS * deviation, NAT):
                self._warn_once(
                    "loss spike",
                    f"the loss jumped to {loss:.4f} at step {step}, from a median of {median:.4f} over {len(self.losses)} steps "
                    f"({self.facts.describe_batch()}); look at these, and if it stays up {self.advice()}",
                )
        self.losses = [*self.losses, loss][-WINDOW:]

    def _warn_once(self, kind: str, line: str) -> None:
        if kind not in self.warned:
            self.warned.append(kind)
            self.warn(f"warning: {line}; said once")


def enumerate_numbers(unit: str, numbers: Sequence[int]) -> str:
    """Return a text such as `records 3, 7 and 12 more`."""
    shown = ", ".join(f"{number:,}" for number in numbers[:MAX_NUMBERS])
    more = f" and {len(numbers) - MAX_NUMBERS:,} more" if len(numbers) > MAX_NUMBERS else ""
    return f"{unit}{'s' if len(numbers) > 1 else ''} {shown}{more}"
