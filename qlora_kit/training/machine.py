"""The device of this run; refuse what it cannot do."""

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from qlora_kit.config import GIB, Config
from qlora_kit.config_file import override
from qlora_kit.data.source import estimate_tokens
from qlora_kit.errors import Failed, UserError, unsupported
from qlora_kit.fast.nf4 import why_no_triton
from qlora_kit.model.device import cap_memory, choose_device, describe_device, is_out_of_memory, memory_gib, usable_dtype
from qlora_kit.output.checkpoints import Checkpoint
from qlora_kit.planning.fit import check_fit
from qlora_kit.planning.plan import Plan, make_plan, plan_inputs, resume_plan
from qlora_kit.planning.shape import ModelShape
from qlora_kit.shipped import spell_command
from qlora_kit.training.processes import Team, check_identical

PATIENCE_SECONDS = 2 * 3600  # a longer CPU run is refused unless training.device is cpu


@dataclass(frozen=True)
class Machine:
    """The device that a run computes on, and the lines that describe it."""

    device: str  # cuda or cpu
    dtype: torch.dtype  # of products, and of every frozen tensor that is not quantized
    description: list[str]
    limit: float | None = None  # bytes that torch's allocator may take; None on a CPU
    compiles: bool = True  # whether torch.compile works here

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def memory_gib(self) -> dict[str, float]:
        return memory_gib(self.device)


def plan_run(
    config: Config, shape: ModelShape | None, reason: str | None, checkpoint: Checkpoint | None, team: Team
) -> tuple[Machine, Plan]:
    """Choose the device, the micro-batch and the recomputed layers, and check that the run fits on the GPU.

    Args:
        shape: of the base model, if it is built like Llama.
        reason: why the run does not take the fast path, or None.

    Raises:
        UserError: it does not fit, or the machine lacks what the settings need.
    """
    machine = look_at_machine(config, shape)
    check_identical(team, {"training.device": machine.device, "quantization.compute_dtype": machine.dtype_name})
    # Without torch.compile the same division takes more memory.
    here = config if machine.compiles else override(config, {"performance.compile": False})
    fast = None if reason else shape
    limit = min(team.gather(machine.limit)) if machine.limit is not None else None  # of the fullest GPU: all take the same plan
    plan = make_plan(here, fast, limit, team.count)
    if checkpoint:
        unchanged = checkpoint.run["plan_inputs"] == plan_inputs(config) and checkpoint.run["processes"] == team.count
        plan = resume_plan(plan, here, fast, limit, checkpoint.run, unchanged, team.count)
    check_fit(plan, here, shape, limit, team.count)
    return machine, plan


def look_at_machine(config: Config, shape: ModelShape | None) -> Machine:
    """Choose device and dtype, and cap the GPU memory at performance.vram_limit_gib.

    Raises:
        UserError: the settings need what this machine lacks, or days on a CPU.
    """
    reporter = config.training.report_to
    if reporter != "none" and importlib.util.find_spec(reporter) is None:
        raise UserError("training.report_to", reporter, "is not installed", f"run pip install {reporter}, or use none")
    device = choose_device(config.training.device)
    if device == "cpu" and config.training.device == "auto" and shape:
        check_patience(config, shape)
    check_switches(config, device)
    dtype, note = usable_dtype(config.quantization.compute_dtype, device)
    limit = None
    if device == "cuda":
        limit = float(torch.cuda.mem_get_info()[0])
        if config.performance.vram_limit_gib is not None:
            cap_memory(config.performance.vram_limit_gib)
            limit = min(limit, config.performance.vram_limit_gib * GIB)
    lines = [*describe_device(device), *([note] if note else [])]
    if device == "cpu" and config.training.optim.startswith("paged"):
        lines.append(f"{config.training.optim}: paging needs a GPU; the optimizer's state stays in ordinary memory here")
    return Machine(device, dtype, lines, limit, device == "cuda" and why_no_triton() is None)


def check_switches(config: Config, device: str) -> None:
    """Refuse switches that are `true` and cannot work here; build.py refuses what only the loaded model shows.

    Raises:
        UserError: one problem for each key.
    """
    reason = (
        "needs a CUDA GPU" if device == "cpu" else None if config.performance.fused_lora else "performance.fused_lora is false"
    )
    remedies = {"compile": "auto or false", "cuda_graphs": "auto or false", "offload_embedding": "false"}
    wanted = [key for key in remedies if getattr(config.performance, key) is True]
    if reason and wanted:
        raise UserError.of(unsupported(f"performance.{key}", reason, remedies[key]) for key in wanted)
    if reason and config.performance.fsdp == "offload":
        raise UserError("performance.fsdp", "offload", f"cannot work here ({reason})", "use true or false")


def check_patience(config: Config, shape: ModelShape) -> None:
    """Refuse a CPU run of hours unless training.device is cpu.

    Raises:
        UserError: the run would take more than PATIENCE_SECONDS.
    """
    per_token = shape.training_flops_per_token(recompute=False) / _cpu_flops_per_second()
    tokens_per_step = config.effective_batch * config.data.max_length
    tokens_per_epoch = estimate_tokens(config.data)
    if config.training.max_steps:
        tokens = float(config.training.max_steps * tokens_per_step)
    elif tokens_per_epoch:
        tokens = config.training.num_epochs * tokens_per_epoch
    else:
        tokens = 100.0 * tokens_per_step  # the size of the data is unknown here: judge a short run
    seconds = tokens * per_token
    if seconds > PATIENCE_SECONDS:
        raise UserError(
            "training.device",
            None,
            f"no CUDA GPU was found, and training {config.model.name} on this CPU takes {format_duration(seconds)} or more",
            f"try the laptop model, {spell_command('train_qlora.py')} --config configs/tiny.yaml, or insist with "
            "--set training.device=cpu",
        )


def format_duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.0f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"


@cache
def _cpu_flops_per_second() -> float:
    """Return the speed of one fp32 product of 512 tokens with a 2048 x 2048 weight on this CPU: an upper bound for training."""
    tokens, width = 512, 2048
    x, weight = torch.randn(tokens, width), torch.randn(width, width)
    x @ weight
    started = time.perf_counter()
    x @ weight
    return 2 * tokens * width * width / (time.perf_counter() - started)


@contextmanager
def explaining_out_of_memory(config: Config, planned: bool) -> Iterator[None]:
    """Turn an out-of-memory error for which no smaller micro-batch is left into one line, with the remedies in order of cost.

    Args:
        planned: whether the run takes the fast path.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        length, rank, same = config.data.max_length, config.lora.rank, "(same result, slower)"
        remedies = {
            # Others were halved down to one sequence already.
            f"--set performance.micro_batch=1 {same}": config.performance.fsdp and config.performance.micro_batch != 1,
            f"--set training.gradient_checkpointing=true {same}": config.training.gradient_checkpointing is not True,
            f"--set performance.offload_embedding=true {same}": planned and not config.performance.offload_embedding,
            f"--max_length {length // 2}": length >= 16,
            f"--rank {rank // 2}": rank >= 2,
            "a smaller base model": True,
        }
        peak = memory_gib("cuda" if torch.cuda.is_available() else "cpu").get("peak_reserved", 0.0)
        tried = ", then ".join(remedy for remedy, helps in remedies.items() if helps)
        raise Failed(f"the GPU's memory is full at {peak:.2f} GiB; try {tried}") from None
