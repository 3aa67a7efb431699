"""How to divide an optimizer step so that it fits and is fast, and what to change when nothing fits.

From the shapes alone (memory.py), before any weight is loaded. Imports no torch.
"""

import math
from dataclasses import dataclass
from typing import Any

from qlora_kit.config import Config
from qlora_kit.errors import UserError
from qlora_kit.planning.memory import estimate_memory
from qlora_kit.planning.shape import ModelShape


@dataclass(frozen=True)
class Plan:
    """How an optimizer step is divided, and what that takes; `parts` is empty where nothing is predicted."""

    micro_batch: int  # sequences per forward pass
    recomputed: int  # layers
    parts: dict[str, float]  # bytes
    keep_weights: bool = False  # whether the backward pass finds the weights that the forward pass unpacked

    @property
    def peak(self) -> float:
        """Bytes of torch's allocator."""
        return sum(self.parts.values())


# Share of the limit that a plan fills: the prediction may be 8 % off.
FILL = 0.9
# Cost of a micro-step beside its tokens (unpacking weights, launching), in tokens' worth of work; and of recomputing all layers,
# as a share. Fitted on an H200, 2026-11-22, to micro-steps of 512, 2,048 and 8,192 tokens with all layers computed again (36.5,
# 80.6 and 275.1 ms) and of the last two with none (65.3 and 216.6 ms; 214.7 with each weight unpacked once).
MICRO_STEP_TOKENS = 600
RECOMPUTATION = 0.27
KEPT_WEIGHTS_TOKENS = 80  # of those, what unpacking only once saves


def make_plan(config: Config, shape: ModelShape | None, limit: float | None, processes: int = 1) -> Plan:
    """The fastest division of a process's share of the effective batch within `limit` bytes, or the smallest one when none fits.

    `performance.micro_batch` and `training.gradient_checkpointing` are free where they are `auto`. Without a limit (a CPU) or a
    shape nothing is chosen: the micro-batch is `batch_size`.
    """
    recompute, micro = config.training.gradient_checkpointing, config.performance.micro_batch
    if shape is None or limit is None or not config.performance.fused_lora:
        layers = shape.layers if shape and (recompute is True or (recompute == "auto" and limit is not None)) else 0
        share = math.gcd(config.training.batch_size, config.effective_batch // processes)
        return Plan(share if micro == "auto" else int(micro), layers, {})
    batches = _divisors(config.effective_batch // processes) if micro == "auto" else [int(micro)]
    choices = {"auto": range(shape.layers + 1), True: [shape.layers], False: [0]}[recompute]
    divisions = [(b, n, False) for b in batches for n in choices]
    if recompute == "auto" and not config.performance.fsdp:
        divisions += [(b, 0, True) for b in batches]
    plans = [Plan(b, n, estimate_memory(shape, config, b, n, keep, processes), keep) for b, n, keep in divisions]
    fitting = [plan for plan in plans if plan.peak <= FILL * limit]
    if not fitting:
        return min(plans, key=lambda plan: plan.peak)

    def cost(plan: Plan) -> float:
        tokens = plan.micro_batch * config.data.max_length
        beside = MICRO_STEP_TOKENS - KEPT_WEIGHTS_TOKENS * plan.keep_weights
        return beside / tokens + RECOMPUTATION * plan.recomputed / shape.layers

    return min(fitting, key=cost)


def plan_inputs(config: Config) -> dict[str, Any]:
    """The settings that decide a division, beside what is free on the GPU."""
    return {"gradient_checkpointing": config.training.gradient_checkpointing} | config.performance.model_dump()


def resume_plan(
    plan: Plan, config: Config, shape: ModelShape | None, limit: float | None, before: dict[str, Any], settings_unchanged: bool,
    processes: int = 1,
) -> Plan:  # fmt: skip
    """The division that a resumed run had, so that it rounds alike, unless its settings now ask for another or it no longer fits.

    Args:
        before: `micro_batch`, `recomputed` and `keep_weights` of the run to resume.
        settings_unchanged: whether `plan_inputs` says what it said then.
    """
    micro_batch, recomputed, keep = before["micro_batch"], before["recomputed"], before["keep_weights"]
    if not settings_unchanged or config.effective_batch % micro_batch:
        return plan
    parts = estimate_memory(shape, config, micro_batch, recomputed, keep, processes) if shape and plan.parts else {}
    again = Plan(micro_batch, recomputed, parts, keep)
    return plan if limit is not None and again.peak > 1.08 * limit else again


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def check_division(config: Config, count: int) -> None:
    """An optimizer step sees the same sequences however many processes share it.

    Raises:
        UserError: they cannot share it evenly, or there is one alone where several are needed.
    """
    effective, micro_batch = config.effective_batch, config.performance.micro_batch
    step = f"{effective} sequences of an optimizer step (training.batch_size x training.gradient_accumulation_steps)"
    if config.performance.fsdp and count == 1:
        fsdp = str(config.performance.fsdp).lower()
        raise UserError(
            f"performance.fsdp: {fsdp}: needs several processes; start them with torchrun --nproc_per_node=2 train_qlora.py, "
            "or use false"
        )
    if effective % count:
        raise UserError(
            f"{count} processes: do not divide the {step}; use a divisor of it, or set training.batch_size={count} or a multiple"
        )
    if micro_batch != "auto" and effective // count % int(micro_batch):
        raise UserError(
            f"performance.micro_batch: {micro_batch}: does not divide the {effective // count} sequences of each process, "
            f"of the {step}; use a divisor, or auto"
        )
