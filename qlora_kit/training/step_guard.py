"""A last look at each optimizer step before the optimizer sees it: is it a number, has the loss jumped, does every LoRA B learn?

A step whose loss or gradient is infinite or NaN ends the run, or is left out: then its number and its place in the schedule are
used up, and adapter and optimizer stay as they were. The two warnings are given once in a run. What the guard has seen is kept
in checkpoints, so that a resumed run judges as the uninterrupted one does.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from qlora_kit.errors import Failed
from qlora_kit.training.report import RunReport

# A jump of the loss: above the median of the last WINDOW steps by ten robust standard deviations, and by a nat, which is e times
# the perplexity. 1.4826 times the median absolute deviation is one standard deviation of normally distributed values.
WINDOW, ENOUGH = 50, 20
DEVIATIONS, NAT = 10 * 1.4826, 1.0
FIRST_STEPS = 2  # in which a B without a gradient is not spoken of
NAMED = 20  # records in one line


class StepGuard:
    """Decides on optimizer steps, counted from 1.

    Args:
        batch: what the step at hand was computed on, in words.
        stands: what is left on disk when the run ends here, in words.
        silent: names of the LoRA B whose gradient is zero at this moment.
    """

    def __init__(
        self, report: RunReport, batch: Callable[[], str], stands: Callable[[], str], silent: Callable[[], Sequence[str]]
    ):
        self.report, self.batch, self.stands, self.silent = report, batch, stands, silent
        self.skipped: list[int] = []
        self.losses: list[float] = []  # nats a token, of the last steps
        self.told: list[str] = []  # warnings given

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON; float to text and back is exact."""
        return {"skipped": self.skipped, "losses": self.losses, "told": self.told}

    def restore(self, state: dict[str, Any]) -> None:
        self.skipped, self.losses, self.told = (list(state[name]) for name in ("skipped", "losses", "told"))

    def passes(
        self, step: int, loss: torch.Tensor, norm: torch.Tensor, smallest: torch.Tensor, loss_scale: Callable[[], float] | None
    ) -> bool:
        """Whether the optimizer may see the step; waits for the GPU, once.

        Args:
            loss: of the step, nats a token, ().
            norm: of the gradient, before it was clipped, ().
            smallest: of all LoRA B, the least of their gradients' largest values, ().
            loss_scale: reads float16's; None without one.

        Raises:
            Failed: the loss or the norm is infinite or NaN, and no more steps may be left out.
        """
        value, size, least = torch.stack([number.float().to(loss.device) for number in (loss, norm, smallest)]).tolist()
        if not math.isfinite(value):
            return self._leave_out(step, f"the loss is {value}")
        if not math.isfinite(size):
            # In float16 the library's loss scaling leaves such a step out by itself, and halves its scale.
            return (loss_scale is not None and loss_scale() >= 1) or self._leave_out(step, f"the gradient's norm is {size}")
        self._watch_loss(step, value)
        if step > FIRST_STEPS and least == 0:
            self._tell_once("zero gradient", self._no_gradient(step))
        return True

    def _leave_out(self, step: int, what: str) -> bool:
        allowed = self.report.config.training.max_skipped_steps
        where = f"{what} at step {step} ({self.batch()}, computed in {self.report.machine.dtype_name})"
        if len(self.skipped) < allowed:
            self.skipped.append(step)
            left = allowed - len(self.skipped)
            self.report.log.line(f"warning: {where}: the step is left out; {left} more may be (training.max_skipped_steps)")
            return False
        leave = f"training.max_skipped_steps={allowed + 1} leaves the step out"
        raise Failed(
            f"{where}: stopped before the optimizer saw it, and no adapter was written; {self.advice()}; {leave}; {self.stands()}"
        )

    def advice(self) -> str:
        """What mends a loss that is no number, by the dtype of the run."""
        rate = f"a lower --learning_rate (now {self.report.config.training.learning_rate})"
        wider = {"float16": ", or quantization.compute_dtype bfloat16 or float32", "bfloat16": ", or compute_dtype float32"}
        return f"try {rate}{wider.get(self.report.machine.dtype_name, '')}"

    def _watch_loss(self, step: int, loss: float) -> None:
        if len(self.losses) >= ENOUGH:
            middle = statistics.median(self.losses)
            spread = statistics.median(abs(one - middle) for one in self.losses)
            if loss > middle + max(DEVIATIONS * spread, NAT):
                self._tell_once(
                    "loss spike",
                    f"the loss jumped to {loss:.4f} at step {step}, from a median of {middle:.4f} over {len(self.losses)} steps "
                    f"({self.batch()}); look at these, and where it stays up {self.advice()}",
                )
        self.losses = [*self.losses, loss][-WINDOW:]

    def _no_gradient(self, step: int) -> str:
        names = self.silent()
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return (
            f"the gradient of {names[0]}{more} is exactly zero at step {step}: "
            "it learns nothing; see lora.target_modules, or quantization.compute_dtype if that is float16"
        )

    def _tell_once(self, what: str, line: str) -> None:
        if what not in self.told:
            self.told.append(what)
            self.report.log.line(f"warning: {line}; said once")


def numbered(unit: str, numbers: Sequence[int]) -> str:
    """`records 3, 7 and 12 more`."""
    shown = ", ".join(f"{number:,}" for number in numbers[:NAMED])
    more = f" and {len(numbers) - NAMED:,} more" if len(numbers) > NAMED else ""
    return f"{unit}{'s' if len(numbers) > 1 else ''} {shown}{more}"
