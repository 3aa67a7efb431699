"""The machine a run meets: which device, which dtype it can compute in, how much memory, and whether it makes sense.

One process, one device: its own GPU of those visible, the first where it is alone, or the CPU.
"""

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qlora_kit.errors import Failed, UserError, cannot_work
from qlora_kit.memory import GIB, ModelShape
from qlora_kit.settings import Config
from qlora_kit.sources import estimate_tokens

PATIENCE_SECONDS = 2 * 3600  # a CPU run that would take longer than this is asked about first
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(wanted: str, key: str = "training.device") -> str:
    """`auto` takes the GPU when there is one.

    Args:
        key: what messages call the choice: a key of the config, or a flag.

    Raises:
        UserError: `cuda` was asked for and torch sees no GPU.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        build = (
            "this torch is a CPU build; install a CUDA build"
            if torch.version.cuda is None
            else "check the driver with nvidia-smi"
        )
        instead = f"{key} auto" if key.startswith("--") else f"--set {key}=auto"
        raise UserError(f"{key}: cuda: torch finds no CUDA GPU; {build}, or use {instead}")
    if wanted == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return "cuda"


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


def cap_memory(limit_gib: float) -> None:
    """Let torch's allocator fail beyond `limit_gib`, as a card of that size would.

    Raises:
        UserError: the GPU is smaller than the limit.
    """
    total = torch.cuda.get_device_properties(0).total_memory
    if limit_gib * GIB > total:
        raise UserError(
            f"performance.vram_limit_gib: {limit_gib}: this GPU has {total / GIB:.1f} GiB; use less, or null for no limit"
        )
    torch.cuda.set_per_process_memory_fraction(limit_gib * GIB / total)


def usable_dtype(name: str, device: str, insisted: bool = True) -> tuple[torch.dtype, str | None]:
    """The compute dtype, and one line when it is not what was hoped for.

    Args:
        insisted: False for an adapter's own dtype, which its user did not choose: what lacks it falls back as `auto` does.

    Raises:
        UserError: float16 on the CPU, which has no loss scaling there; bfloat16 asked for on a GPU without it.
    """
    has_bfloat16 = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if not insisted and ((name == "bfloat16" and not has_bfloat16) or (name == "float16" and device == "cpu")):
        name = "auto"
    if name == "float16" and device == "cpu":
        raise UserError("quantization.compute_dtype: float16: needs a GPU; use bfloat16 or float32 on the CPU")
    if name == "bfloat16" and not has_bfloat16:
        raise UserError(f"quantization.compute_dtype: bfloat16: {torch.cuda.get_device_name(0)} lacks it; use float16, or auto")
    if name == "auto" and not has_bfloat16:
        return torch.float16, f"{torch.cuda.get_device_name(0)} has no bfloat16: computing in float16 instead"
    if name == "auto":
        name = "bfloat16" if device == "cuda" else "float32"  # few laptop processors have fast bfloat16
    return DTYPES[name], None


def describe_device(device: str) -> list[str]:
    """Lines for the reader: the device and its memory."""
    if device == "cpu":
        return [f"Device: cpu, {torch.get_num_threads()} threads"]
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return [f"Device: cuda, {properties.name}, {total / GIB:.2f} GiB, {free / GIB:.2f} GiB free"]


def memory_gib(device: str) -> dict[str, float]:
    """GiB that torch's allocator holds now and held at its peak; empty on the CPU."""
    if device == "cpu":
        return {}
    return {
        "allocated": torch.cuda.memory_allocated() / GIB,
        "reserved": torch.cuda.memory_reserved() / GIB,
        "peak_allocated": torch.cuda.max_memory_allocated() / GIB,
        "peak_reserved": torch.cuda.max_memory_reserved() / GIB,
    }


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory is full: torch's allocator, a library's workspace, or CUDA itself may say so."""
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


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
