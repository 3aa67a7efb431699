"""How to divide an optimizer step so that it fits and is fast, and what to change when nothing fits.

From the shapes alone (memory.py), before any weight is loaded. Imports no torch.
"""

import math
from dataclasses import dataclass
from typing import Any

from qlora_kit.config import override
from qlora_kit.errors import UserError
from qlora_kit.hub import go_offline_if_unreachable, is_local, read_model_config
from qlora_kit.memory import (
    CONTEXT_BYTES,
    GIB,
    KNOWN_CONFIGS,
    ModelShape,
    estimate_memory,
    optimizer_bytes,
    read_shape,
    why_not_written_out,
)
from qlora_kit.processes import check_division
from qlora_kit.settings import Config


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


PAGED = {"adamw_8bit": "paged_adamw_8bit", "adamw_torch": "paged_adamw_32bit"}  # the same update, its state outside the allocator
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


def asked(config: Config) -> dict[str, Any]:
    """The settings that decide a division, beside what is free on the GPU."""
    return {"gradient_checkpointing": config.training.gradient_checkpointing} | config.performance.model_dump()


def go_on_as_planned(
    plan: Plan, config: Config, shape: ModelShape | None, limit: float | None, before: dict[str, Any], same_wish: bool,
    processes: int = 1,
) -> Plan:  # fmt: skip
    """The division that a resumed run had, so that it rounds alike, unless its settings now ask for another or it no longer fits.

    Args:
        before: `micro_batch`, `recomputed` and `keep_weights` of the run to resume.
        same_wish: whether `asked` says what it said then.
    """
    micro_batch, recomputed, keep = before["micro_batch"], before["recomputed"], before["keep_weights"]
    if not same_wish or config.effective_batch % micro_batch:
        return plan
    parts = estimate_memory(shape, config, micro_batch, recomputed, keep, processes) if shape and plan.parts else {}
    again = Plan(micro_batch, recomputed, parts, keep)
    return plan if limit is not None and again.peak > 1.08 * limit else again


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def check_fit(plan: Plan, config: Config, shape: ModelShape | None, limit: float | None, processes: int = 1) -> None:
    """Refuse, before anything is loaded, a run that cannot fit even if the prediction is 8 % too high.

    Raises:
        UserError: one line with the cheapest change that fits.
    """
    if shape is None or limit is None or not plan.parts or plan.peak <= 1.08 * limit:
        return
    cap = config.performance.vram_limit_gib
    where = f"performance.vram_limit_gib: {cap}" if cap and cap * GIB <= limit else f"GPU memory: {limit / GIB:.2f} GiB free"
    needs = f"needs {plan.peak / GIB:.2f} GiB with these settings, {plan.parts['projection weights'] / GIB:.2f} of it for weights"
    raise UserError(f"{where}: training {config.model.name} {needs}; {remedy(config, shape, limit, processes)}")


def remedy(config: Config, shape: ModelShape, limit: float, processes: int = 1) -> str:
    """The cheapest change that makes a run fit into `limit` bytes, as flags."""
    change = cheapest_change(config, shape, limit, processes)
    if change is None:
        return "no setting makes it fit: use a smaller base model"
    values = config.model_dump()
    named = {"lora.rank": "--rank ", "data.max_length": "--max_length "}  # these win over --set, wherever it stands
    changed = {key: str(value).lower() for key, value in change.items() if value != _value(values, key)}
    flags = [f"{named.get(key, f'--set {key}=')}{value}" for key, value in changed.items()]
    return f"the cheapest change that fits: {' '.join(flags)}"


def _value(values: dict[str, Any], dotted: str) -> Any:
    section, key = dotted.split(".")
    return values[section][key]


def cheapest_change(config: Config, shape: ModelShape, limit: float, processes: int = 1) -> dict[str, Any] | None:
    """Keys and values that make a run fit into `limit` bytes, those with the same result first; None when nothing does."""
    length, rank, optim, dtype = (
        config.data.max_length,
        config.lora.rank,
        config.training.optim,
        config.quantization.compute_dtype,
    )
    free = {"performance.micro_batch": "auto", "training.gradient_checkpointing": "auto"}
    paged = free | {"training.optim": PAGED.get(optim, optim)}
    divided = {"performance.fsdp": True} if processes > 1 and not config.performance.fsdp else {}
    offloaded = paged | divided | {"performance.offload_embedding": True}
    hosted = paged | {"performance.fsdp": "offload"} if processes > 1 else offloaded
    narrow = {"quantization.load_in_4bit": True, "quantization.compute_dtype": "auto" if dtype == "float32" else dtype}
    least = hosted | narrow | {"quantization.use_double_quant": True}
    changes: list[dict[str, Any]] = [free, paged, paged | divided, offloaded, hosted, free | narrow, least]
    for halvings in (1, 2, 3):
        shorter = {"data.max_length": min(length, max(length >> halvings, 128))}
        smaller = {"lora.rank": min(rank, max(rank >> halvings, 4))}
        changes += [least | shorter, least | smaller, least | shorter | smaller]
    fitting = (change for change in changes if make_plan(override(config, change), shape, limit, processes).peak <= limit)
    return next(fitting, None)


def plan_table(plan: Plan, config: Config, shape: ModelShape, limit: float, card: str, processes: int = 1) -> str:
    """What a run will take part by part, whether `limit` bytes of `card` hold it, and the cheapest change when they do not."""
    each = f"each of {processes} processes: " if processes > 1 else ""
    title = (
        f"{config.model.name}: {each}{plan.micro_batch} x {config.effective_batch // processes // plan.micro_batch} sequences of "
    )
    title += (
        f"{config.data.max_length} tokens, rank {config.lora.rank}, {plan.recomputed} of {shape.layers} layers computed again"
    )
    title += ", weights unpacked once" if plan.keep_weights else ""
    paged = 0.0 if plan.parts["optimizer state"] else optimizer_bytes(config.training.optim) * plan.parts["adapters (fp32)"] / 4
    rows = list(plan.parts.items())
    rows += [("sum: torch's allocator", plan.peak), ("paged optimizer state", paged), ("CUDA context (about)", CONTEXT_BYTES)]
    lines = [title, *(f"  {name:<24}{size / GIB:6.2f} GiB" for name, size in rows)]
    if plan.peak <= limit:
        return "\n".join([*lines, f"Fits: {plan.peak / GIB:.2f} of {limit / GIB:.2f} GiB ({card})."])
    verdict = f"Does not fit: {plan.peak / GIB:.2f} GiB, and there are {limit / GIB:.2f} ({card}); "
    return "\n".join([*lines, verdict + remedy(config, shape, limit, processes)])


def other_strategy(config: Config, shape: ModelShape, limit: float, processes: int) -> str:
    """What several processes would take with performance.fsdp the other way."""
    fsdp = not config.performance.fsdp
    plan = make_plan(override(config, {"performance.fsdp": fsdp}), shape, limit, processes)
    how = "the base model divided over them" if fsdp else "the whole base model in each"
    fits = "fits" if plan.peak <= limit else "does not fit"
    return f"With {how} (performance.fsdp={str(fsdp).lower()}): {plan.peak / GIB:.2f} GiB, {fits}."


def read_written_out_shape(config: Config) -> tuple[ModelShape | None, str | None]:
    """The model's shape if it is built like Llama, and why it will not go through the fast path, if it will not.

    Raises:
        UserError: it cannot be divided as performance.fsdp asks.
    """
    model_config = read_model_config(config.model)
    reason = why_not_written_out(model_config, config.data.max_length)
    if not config.performance.fused_lora:
        reason = "performance.fused_lora is false"
    if config.performance.fsdp and reason:
        raise UserError(f"performance.fsdp: cannot work here ({reason}); use false")
    return read_shape(model_config), reason


def describe_plan(config: Config, processes: int) -> str:
    """The plan for the card that performance.vram_limit_gib stands for, else for this machine's GPU, else for one of 8 GiB.

    Raises:
        UserError: nothing is predicted for this architecture, or for the library's layers.
    """
    check_division(config, processes)
    if not is_local(config.model.name) and config.model.name not in KNOWN_CONFIGS:
        go_offline_if_unreachable()
    shape, reason = read_written_out_shape(config)
    if shape is None or reason:
        raise UserError(f"--plan: {config.model.name}: no prediction ({reason}); train with a small --max_steps and read the log")
    card, gib = "performance.vram_limit_gib", config.performance.vram_limit_gib
    if gib is None:
        import torch

        card, gib = "no GPU here: a card of 8 GiB assumed, less CUDA's own", 8.0 - CONTEXT_BYTES / GIB
        if torch.cuda.is_available():
            card, gib = f"free on {torch.cuda.get_device_name(0)}", torch.cuda.mem_get_info()[0] / GIB
    limit = gib * GIB
    table = plan_table(make_plan(config, shape, limit, processes), config, shape, limit, card, processes)
    return table if processes == 1 else f"{table}\n{other_strategy(config, shape, limit, processes)}"
