"""The machine a run meets: which device, which dtype it can compute in, how much memory, and whether it makes sense.

One process, one device: its own GPU of those visible, the first where it is alone, or the CPU.
"""

import torch

from qlora_kit.config import GIB
from qlora_kit.errors import UserError

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory is full: torch's allocator, a library's workspace, or CUDA itself may say so."""
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
