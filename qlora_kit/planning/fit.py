"""Refuse a run that cannot fit, name the cheapest change that fits, and show the plan of a run."""

import math
from typing import Any

from qlora_kit.config import GIB, MIB, Config
from qlora_kit.errors import UserError
from qlora_kit.planning.cards import Card
from qlora_kit.planning.memory import CONTEXT_BYTES, estimate_memory
from qlora_kit.planning.plan import TOLERANCE, Plan, make_plan
from qlora_kit.planning.shape import ModelShape
from qlora_kit.planning.time import predict_run_seconds, predict_step_seconds

PAGED = {"adamw_8bit": "paged_adamw_8bit", "adamw_torch": "paged_adamw_32bit"}  # the same update, its state outside the allocator
# Of two cores of an AMD EPYC: 2,631 tokens/s of the laptop model, whose products take 14 million operations a token (2026-11-22).
CPU_FLOPS = 37e9
CPU_PATIENCE = 2 * 3600  # seconds; a longer run is planned for a GPU
PYTHON_BYTES = 0.48 * GIB  # resident after importing the libraries, torch 2.12 for the CPU on Linux (2026-11-27)
NAMED_FLAGS = {"lora.rank": "--rank ", "data.max_length": "--max_length "}  # a named flag overrides --set


def check_fit(plan: Plan, config: Config, shape: ModelShape | None, limit: float | None, processes: int = 1) -> None:
    """Refuse, before anything is loaded, a run that cannot fit even if the prediction is 8 % too high.

    Raises:
        UserError: the run does not fit; the remedy is the cheapest change that does.
    """
    if shape is None or limit is None or not plan.parts or plan.peak <= TOLERANCE * limit:
        return
    needed, weights = plan.peak / GIB, plan.parts["projection weights"] / GIB
    problem = (
        f"is too little for {config.model.name}, which needs {needed:.2f} GiB with these settings, {weights:.2f} for weights"
    )
    cap = config.performance.vram_limit_gib
    binds = cap is not None and cap * GIB <= limit
    key, value = ("performance.vram_limit_gib", cap) if binds else ("free GPU memory", f"{limit / GIB:.2f} GiB")
    raise UserError(key, value, problem, remedy(config, shape, limit, processes))


def remedy(config: Config, shape: ModelShape, limit: float, processes: int = 1) -> str:
    """Return the advice that makes a run fit into `limit` bytes: the flags of the cheapest change, or a smaller base model."""
    change = cheapest_change(config, shape, limit, processes)
    if change is None:
        return "use a smaller base model: no setting makes this one fit"
    changed = {key: str(value).lower() for key, value in change.items() if value != _value(config, key)}
    flags = [f"{NAMED_FLAGS.get(key, f'--set {key}=')}{value}" for key, value in changed.items()]
    return f"add {' '.join(flags)}, the cheapest change that fits"


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _replace(config: Config, changes: dict[str, Any]) -> Config:
    for key, value in changes.items():
        section, name = key.split(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    return config


def cheapest_change(config: Config, shape: ModelShape, limit: float, processes: int = 1) -> dict[str, Any] | None:
    """Return the keys and values that make a run fit into `limit` bytes, or None when nothing does.

    Changes that leave the result the same come first; then plain LoRA becomes QLoRA; then blocks and rank shrink.
    """
    length, rank, dtype = config.data.max_length, config.lora.rank, config.quantization.compute_dtype
    planned = {"performance.micro_batch": "auto", "training.gradient_checkpointing": "auto"}
    paged = planned | {"training.optim": PAGED.get(config.training.optim, config.training.optim)}
    sharded = paged | ({"performance.fsdp": True} if processes > 1 and not config.performance.fsdp else {})
    offloaded = sharded | {"performance.offload_embedding": True}
    on_host = paged | {"performance.fsdp": "offload"} if processes > 1 else offloaded
    narrow = {"quantization.load_in_4bit": True, "quantization.compute_dtype": "auto" if dtype == "float32" else dtype}
    least = on_host | narrow | {"quantization.use_double_quant": True}
    changes: list[dict[str, Any]] = [planned, paged, sharded, offloaded, on_host, planned | narrow, least]
    for halvings in (1, 2, 3):
        shorter = {"data.max_length": min(length, max(length >> halvings, 128))}
        smaller = {"lora.rank": min(rank, max(rank >> halvings, 4))}
        changes += [least | shorter, least | smaller, least | shorter | smaller]
    fitting = (change for change in changes if make_plan(_replace(config, change), shape, limit, processes).peak <= limit)
    return next(fitting, None)


def plan_table(plan: Plan, config: Config, shape: ModelShape, limit: float, card: str, processes: int = 1) -> str:
    """Return a table of a run's memory and the verdict: `limit` bytes of `card` suffice, or the cheapest change that fits."""
    each = f"each of {processes} processes: " if processes > 1 else ""
    times = config.effective_batch // processes // plan.micro_batch
    title = (
        f"{config.model.name}: {each}{plan.micro_batch} x {times} sequences of {config.data.max_length} tokens, "
        f"rank {config.lora.rank}, {plan.recomputed} of {shape.layers} layers recomputed"
    )
    trained, frozen = shape.lora_parameters(config.lora.rank, config.lora.target_modules), shape.parameters()
    parameters = f"  {trained:,} of {trained + frozen:,} parameters are trained ({100 * trained / (trained + frozen):.2f} %)"
    paged = 0.0 if plan.parts["optimizer state"] else config.training.optimizer_bytes * plan.parts["adapters (fp32)"] / 4
    rows = list(plan.parts.items())
    rows += [("sum: torch's allocator", plan.peak), ("paged optimizer state", paged), ("CUDA context (about)", CONTEXT_BYTES)]
    needed, available = plan.peak / GIB, limit / GIB
    verdict = f"Fits: {needed:.2f} of {available:.2f} GiB ({card})."
    if plan.peak > limit:
        advice = remedy(config, shape, limit, processes)
        verdict = (
            f"Does not fit: needs {needed:.2f} GiB, and {available:.2f} are available ({card}). {advice[:1].upper()}{advice[1:]}."
        )
    return "\n".join([title, parameters, *(f"  {name:<26}{show_size(size)}" for name, size in rows if size), verdict])


def show_size(size: float) -> str:
    """Return bytes as `  1.33 GiB`, or as `  57.1 MiB` below 0.1 GiB."""
    return f"{size / GIB:6.2f} GiB" if size >= 0.1 * GIB else f"{size / MIB:6.1f} MiB"


def describe_other_sharding(config: Config, shape: ModelShape, limit: float, processes: int) -> str:
    """Return the memory of the same processes if performance.fsdp were switched on, or off."""
    fsdp = not config.performance.fsdp
    plan = make_plan(_replace(config, {"performance.fsdp": fsdp}), shape, limit, processes)
    model = "the base model sharded over them" if fsdp else "the whole base model in each"
    fits = "fits" if plan.peak <= limit else "does not fit"
    return f"With {model} (performance.fsdp={str(fsdp).lower()}): {plan.peak / GIB:.2f} GiB, {fits}."


def describe_plan(config: Config, shape: ModelShape, card: Card | None, processes: int, tokens: float | None) -> str:
    """Return the plan for a card, whose memory performance.vram_limit_gib may cap.

    Without a GPU it is that of a short run on the CPU, or for a card of 8 GiB.

    Args:
        card: with its free memory; None without a GPU.
        tokens: of an epoch, or None if the data are not known.
    """
    if card is None and processes == 1 and config.performance.vram_limit_gib is None and config.training.device != "cuda":
        seconds = predict_cpu_seconds(shape, config, tokens)
        if config.training.device == "cpu" or (seconds is not None and seconds < CPU_PATIENCE):
            return describe_cpu_run(config, shape, seconds)
    name, limit = "no GPU here: a card of 8 GiB assumed, less CUDA's own", 8.0 * GIB - CONTEXT_BYTES
    if card is not None:
        name, limit = f"free on {card.name}", card.memory
    cap = config.performance.vram_limit_gib
    if cap is not None and (card is None or cap * GIB < limit):
        name, limit = "performance.vram_limit_gib", cap * GIB
    plan = make_plan(config, shape, limit, processes)
    lines = [plan_table(plan, config, shape, limit, name, processes)]
    if card is None:
        lines.append('Time: name a card to have it predicted, such as --gpu "RTX 4060".')
    elif plan.peak <= limit:
        lines.append(describe_time(config, shape, plan, card, processes, tokens))
    if processes > 1:
        lines.append(describe_other_sharding(config, shape, limit, processes))
    return "\n".join(lines)


def predict_cpu_seconds(shape: ModelShape, config: Config, tokens: float | None) -> float | None:
    """Return the seconds of a run on two cores, without evaluations; None if neither its data nor its steps are known."""
    step = config.effective_batch * config.data.max_length
    total = config.training.max_steps * step if config.training.max_steps else tokens and config.training.num_epochs * tokens
    return total * shape.training_flops_per_token(recompute=False) / CPU_FLOPS if total else None


def describe_cpu_run(config: Config, shape: ModelShape, seconds: float | None) -> str:
    """Return the memory and the time of a run on the CPU, which computes in fp32, in words."""
    exact = config if config.quantization.compute_dtype != "auto" else _replace(config, {"quantization.compute_dtype": "float32"})
    plan = make_plan(exact, shape, None)
    memory = sum(estimate_memory(shape, exact, plan.micro_batch, plan.recomputed).values()) + PYTHON_BYTES
    trained = shape.lora_parameters(config.lora.rank, config.lora.target_modules)
    lines = [
        f"{config.model.name} on the CPU: {plan.micro_batch} x {config.effective_batch // plan.micro_batch} sequences of "
        f"{config.data.max_length} tokens, rank {config.lora.rank}; {trained:,} parameters are trained",
        f"RAM (about)  {show_size(memory).strip()}, {PYTHON_BYTES / GIB:.2f} GiB of them Python and its libraries",
    ]
    if seconds is not None:
        lines.append(f"Time         about {_duration(seconds)} and the evaluations, by arithmetic, on two cores of an AMD EPYC")
    return "\n".join(lines)


def describe_time(config: Config, shape: ModelShape, plan: Plan, card: Card, processes: int, tokens: float | None) -> str:
    """Return the predicted time of a step and of the run in words."""
    step = predict_step_seconds(shape, config, plan, card, processes)
    speed = config.effective_batch * config.data.max_length / step
    text = f"Time on {card.name}, by arithmetic: {step:.2f} s an optimizer step, {speed:,.0f} tokens/s"
    if tokens is None:
        return f"{text}."
    blocks, data = math.ceil(tokens / config.data.max_length), config.data
    evaluated = 0 if data.eval_split is None else data.max_eval_samples or math.ceil(0.1 * blocks)
    seconds = predict_run_seconds(shape, config, plan, card, blocks, evaluated, processes)
    steps = config.total_steps(blocks)
    return f"{text}; about {_duration(seconds)} for about {steps:,} steps with evaluations."


def _duration(seconds: float) -> str:
    """Return a duration with two figures: `12 min`, `1.5 h`."""
    return f"{max(seconds / 60, 1):.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
