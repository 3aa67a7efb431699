"""Choose the micro-batch and the recomputed layers that fit and are fastest.

A plan needs only shapes (memory.py): it is made before any weight is loaded. Imports no torch.
"""

import bisect
import math
from dataclasses import dataclass
from typing import Any

from qlora_kit.config import Config
from qlora_kit.errors import UserError
from qlora_kit.planning.memory import estimate_memory
from qlora_kit.planning.shape import ModelShape

FILL = 0.9  # share of the memory limit that a plan uses: the prediction may be 8 % too low
TOLERANCE = 1.08  # a run is refused only above this share of the limit: the prediction may be 8 % too high
# Fixed cost of a micro-step (unpacking weights, launching kernels) in tokens' worth of work, and the cost of recomputing all
# layers as a share. Fitted on an H200, 2026-11-22, to micro-steps of 512, 2,048 and 8,192 tokens with all layers recomputed
# (36.5, 80.6 and 275.1 ms) and of the last two with none (65.3 and 216.6 ms).
MICRO_STEP_TOKENS = 600
RECOMPUTATION = 0.27


@dataclass(frozen=True)
class Plan:
    """The division of an optimizer step into micro-steps, and the memory that it needs.

    Attributes:
        micro_batch: sequences per forward pass.
        recomputed: layers whose activations are recomputed in the backward pass.
        parts: bytes of each item of memory; empty without a prediction.
    """

    micro_batch: int
    recomputed: int
    parts: dict[str, float]

    @property
    def peak(self) -> float:
        """Return the bytes that torch's allocator needs."""
        return sum(self.parts.values())


def make_plan(config: Config, shape: ModelShape | None, limit: float | None, processes: int = 1) -> Plan:
    """Return the fastest plan within `limit` bytes, or the plan that needs the least memory when none fits.

    It divides one process's share of the effective batch, and chooses `performance.micro_batch` and
    `training.gradient_checkpointing` where they are `auto`. Without a limit (on a CPU) or a shape, the micro-batch is
    `batch_size` and nothing is predicted.
    """
    recompute, micro = config.training.gradient_checkpointing, config.performance.micro_batch
    if shape is None or limit is None or not config.performance.fused_lora:
        layers = shape.layers if shape and (recompute is True or (recompute == "auto" and limit is not None)) else 0
        share = math.gcd(config.training.batch_size, config.effective_batch // processes)
        return Plan(share if micro == "auto" else micro, layers, {})
    batches = _divisors(config.effective_batch // processes) if micro == "auto" else [micro]
    counts = {"auto": range(shape.layers + 1), True: [shape.layers], False: [0]}[recompute]

    def plan_with(micro_batch: int, recomputed: int) -> Plan:
        return Plan(micro_batch, recomputed, estimate_memory(shape, config, micro_batch, recomputed, processes))

    def fits(plan: Plan) -> bool:
        return plan.peak <= FILL * limit

    fitting = []
    for size in batches:
        if plan_with(size, counts[-1]).parts["kept activations"] > FILL * limit:
            break  # larger batches keep more
        # A layer more that is recomputed takes less memory and more time: the first count that fits is the fastest.
        first = bisect.bisect_left(counts, True, key=lambda count: fits(plan_with(size, count)))
        fitting += [plan_with(size, counts[first])] if first < len(counts) else []
    if not fitting:
        return min((plan_with(size, counts[-1]) for size in batches), key=lambda plan: plan.peak)

    def cost(plan: Plan) -> float:
        tokens = plan.micro_batch * config.data.max_length
        return MICRO_STEP_TOKENS / tokens + RECOMPUTATION * plan.recomputed / shape.layers

    return min(fitting, key=cost)


def plan_inputs(config: Config) -> dict[str, Any]:
    """Return the settings that a plan depends on."""
    return {"gradient_checkpointing": config.training.gradient_checkpointing} | config.performance.model_dump()


def resume_plan(
    plan: Plan, config: Config, shape: ModelShape | None, limit: float | None, before: dict[str, Any], settings_unchanged: bool,
    processes: int = 1,
) -> Plan:  # fmt: skip
    """Return the interrupted run's plan, so that the resumed run rounds alike, or `plan` where the old plan no longer applies.

    Args:
        plan: of a run that starts now.
        before: `micro_batch` and `recomputed` of the interrupted run.
        settings_unchanged: `plan_inputs` and the number of processes are the same; otherwise `plan` is returned.
    """
    micro_batch, recomputed = before["micro_batch"], before["recomputed"]
    if not settings_unchanged or config.effective_batch % micro_batch:
        return plan
    parts = estimate_memory(shape, config, micro_batch, recomputed, processes) if shape and plan.parts else {}
    resumed = Plan(micro_batch, recomputed, parts)
    return plan if limit is not None and resumed.peak > TOLERANCE * limit else resumed


def _divisors(number: int) -> list[int]:
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})


def check_division(config: Config, count: int) -> None:
    """Check that `count` processes can share an optimizer step evenly, so that it sees the same sequences as with one process.

    Raises:
        UserError: they cannot, or performance.fsdp is set for a single process.
    """
    effective, micro_batch, fsdp = config.effective_batch, config.performance.micro_batch, config.performance.fsdp
    step = f"{effective} sequences of an optimizer step (training.batch_size x training.gradient_accumulation_steps)"
    if fsdp and count == 1:
        remedy = "start them with torchrun --nproc_per_node=2 train_qlora.py, or use false"
        raise UserError("performance.fsdp", fsdp, "needs several processes", remedy)
    if effective % count:
        remedy = f"use a divisor of it, or set training.batch_size={count} or a multiple"
        raise UserError("number of processes", count, f"does not divide the {step}", remedy)
    if micro_batch != "auto" and effective // count % micro_batch:
        problem = f"does not divide the {effective // count} sequences of each process, of the {step}"
        raise UserError("performance.micro_batch", micro_batch, problem, "use a divisor, or auto")
