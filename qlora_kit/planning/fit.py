"""Refuse what cannot fit, name the cheapest remedy; --plan."""

from typing import Any

from qlora_kit.config import GIB, Config
from qlora_kit.config_file import override
from qlora_kit.errors import UserError
from qlora_kit.planning.memory import CONTEXT_BYTES
from qlora_kit.planning.plan import Plan, make_plan
from qlora_kit.planning.shape import ModelShape

PAGED = {"adamw_8bit": "paged_adamw_8bit", "adamw_torch": "paged_adamw_32bit"}  # the same update, its state outside the allocator


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
        f"{config.data.max_length} tokens, rank {config.lora.rank}, {plan.recomputed} of {shape.layers} layers recomputed"
    )
    title += ", weights unpacked once" if plan.keep_weights else ""
    paged = 0.0 if plan.parts["optimizer state"] else config.training.optimizer_bytes * plan.parts["adapters (fp32)"] / 4
    rows = list(plan.parts.items())
    rows += [("sum: torch's allocator", plan.peak), ("paged optimizer state", paged), ("CUDA context (about)", CONTEXT_BYTES)]
    lines = [title, *(f"  {name:<26}{size / GIB:6.2f} GiB" for name, size in rows)]
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
