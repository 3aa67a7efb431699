"""The device of this run; refuse what it cannot do."""

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qlora_kit.config import GIB, Config
from qlora_kit.data.source import estimate_tokens
from qlora_kit.errors import Failed, UserError, cannot_work
from qlora_kit.model.device import cap_memory, choose_device, describe_device, is_out_of_memory, memory_gib, usable_dtype
from qlora_kit.model.hub import go_offline_if_unreachable, is_local, read_model_config
from qlora_kit.model.llama_modules import why_not_llama_like
from qlora_kit.planning.fit import other_strategy, plan_table
from qlora_kit.planning.memory import CONTEXT_BYTES
from qlora_kit.planning.plan import check_division, make_plan
from qlora_kit.planning.shape import KNOWN_CONFIGS, ModelShape, read_shape

PATIENCE_SECONDS = 2 * 3600  # a CPU run that would take longer than this is asked about first


def read_fast_shape(config: Config) -> tuple[ModelShape | None, str | None]:
    """The model's shape if it is built like Llama, and why it will not go through the fast path, if it will not.

    Raises:
        UserError: it cannot be divided as performance.fsdp asks.
    """
    model_config = read_model_config(config.model)
    reason = why_not_llama_like(model_config, config.data.max_length)
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
    shape, reason = read_fast_shape(config)
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


@dataclass(frozen=True)
class Machine:
    """What a run computes on, and lines that say so."""

    device: str  # cuda or cpu
    dtype: torch.dtype  # of products and of everything frozen that is not packed
    description: list[str]
    limit: float | None = None  # bytes that torch's allocator may take; None on a CPU
    compiles: bool = True  # whether torch.compile works here

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def memory_gib(self) -> dict[str, float]:
        return memory_gib(self.device)


def look_at_machine(config: Config, shape: ModelShape | None) -> Machine:
    """Choose device and dtype, and cap the GPU's memory when asked to.

    Raises:
        UserError: the settings ask for what this machine lacks, or for days on a CPU.
    """
    reporter = config.training.report_to
    if reporter != "none" and importlib.util.find_spec(reporter) is None:
        raise UserError(f"training.report_to: {reporter}: not installed; pip install {reporter}, or use none")
    device = choose_device(config.training.device)
    if device == "cpu" and config.training.device == "auto" and shape:
        check_patience(config, shape)
    check_insistence(config, device)
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
    return Machine(device, dtype, lines, limit, device == "cuda" and _compiles())


def _compiles() -> bool:
    from qlora_kit.fast.nf4 import why_no_triton  # bitsandbytes is slow to import, and a mistake is to be answered at once

    return why_no_triton() is None


def check_insistence(config: Config, device: str) -> None:
    """Refuse at once what is asked for with `true` and cannot work; what only the loaded model shows is left to training.py.

    Raises:
        UserError: one problem for each key.
    """
    reason = (
        "needs a CUDA GPU" if device == "cpu" else None if config.performance.fused_lora else "performance.fused_lora is false"
    )
    remedies = {"compile": "auto or false", "cuda_graphs": "auto or false", "offload_embedding": "false"}
    insisted = [key for key in remedies if getattr(config.performance, key) is True]
    if reason and insisted:
        raise UserError(*(cannot_work(f"performance.{key}", reason, remedies[key]) for key in insisted))
    if reason and config.performance.fsdp == "offload":
        raise UserError(f"performance.fsdp: offload: {reason}; use true or false")


def check_patience(config: Config, shape: ModelShape) -> None:
    """Refuse a CPU run of hours that nobody insisted on.

    Raises:
        UserError: one line with the estimate, the laptop config, and how to insist.
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
            f"training.device: no CUDA GPU found, and training {config.model.name} on this CPU would take "
            f"{format_duration(seconds)} or more; try the laptop model: python train_qlora.py --config configs/tiny.yaml, "
            "or insist: --set training.device=cpu"
        )


def format_duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.0f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"


def _cpu_flops_per_second() -> float:
    """Speed of one fp32 product of 512 tokens with a 2048 x 2048 weight on this CPU: an upper bound for training."""
    tokens, width = 512, 2048
    x, weight = torch.randn(tokens, width), torch.randn(width, width)
    x @ weight
    started = time.perf_counter()
    x @ weight
    return 2 * tokens * width * width / (time.perf_counter() - started)


@contextmanager
def out_of_memory_is_one_line(config: Config, planned: bool) -> Iterator[None]:
    """Turn CUDA's out-of-memory traceback, where no smaller micro-batch is tried, into one line: remedies in order of cost.

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
