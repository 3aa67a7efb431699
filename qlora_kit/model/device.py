"""Choose device and dtype, and read GPU memory.

A process has one device: its own GPU of those visible, the first if it is alone, or the CPU.
"""

import torch

from qlora_kit.config import GIB
from qlora_kit.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(wanted: str, key: str = "training.device") -> str:
    """Return cuda or cpu; `auto` takes the GPU if there is one.

    Args:
        wanted: auto, cuda or cpu.
        key: the key of the config, the flag or the argument that messages name.

    Raises:
        UserError: `wanted` is something else, or cuda and torch finds no GPU.
    """
    if wanted not in ("auto", "cuda", "cpu"):
        raise UserError(key, wanted, "is no device", "use auto, cuda or cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        cure = "install a CUDA build of torch" if torch.version.cuda is None else "check the driver with nvidia-smi"
        raise UserError(key, wanted, "needs a GPU, and torch finds none", f"{cure}, or use auto")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def cap_memory(limit_gib: float) -> None:
    """Let torch's allocator fail beyond `limit_gib`, as a card of that size would; raises UserError if the GPU is smaller."""
    total = torch.cuda.get_device_properties(0).total_memory
    if limit_gib * GIB > total:
        problem = f"is more than the {total / GIB:.1f} GiB of this GPU"
        raise UserError("performance.vram_limit_gib", limit_gib, problem, "use less, or null for no limit")
    torch.cuda.set_per_process_memory_fraction(limit_gib * GIB / total)


def usable_dtype(name: str, device: str, insisted: bool = True) -> tuple[torch.dtype, str | None]:
    """Return the dtype to compute in, and a note if it is a fallback.

    Args:
        name: auto, bfloat16, float16 or float32; auto takes bfloat16 on a GPU, and float32 on a CPU.
        insisted: False for an adapter's own dtype, which its user did not choose: fall back as for auto instead of an error.

    Raises:
        UserError: float16 on the CPU, which has no loss scaling there; bfloat16 on a GPU without it.
    """
    has_bfloat16 = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if not insisted and ((name == "bfloat16" and not has_bfloat16) or (name == "float16" and device == "cpu")):
        name = "auto"
    if name == "float16" and device == "cpu":
        raise UserError("quantization.compute_dtype", name, "needs a GPU", "use bfloat16 or float32 on the CPU")
    if name == "bfloat16" and not has_bfloat16:
        problem = f"is not supported by {torch.cuda.get_device_name(0)}"
        raise UserError("quantization.compute_dtype", name, problem, "use float16, or auto")
    if name == "auto" and not has_bfloat16:
        return torch.float16, f"{torch.cuda.get_device_name(0)} has no bfloat16: computing in float16 instead"
    if name == "auto":
        name = "bfloat16" if device == "cuda" else "float32"  # few laptop processors have fast bfloat16
    return DTYPES[name], None


def describe_device(device: str) -> list[str]:
    """Return lines for the reader: the device and its memory."""
    if device == "cpu":
        return [f"Device: cpu, {torch.get_num_threads()} threads"]
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return [f"Device: cuda, {properties.name}, {total / GIB:.2f} GiB, {free / GIB:.2f} GiB free"]


def free_gpu_memory() -> tuple[str, float] | None:
    """Return the name of this machine's GPU and its free bytes; None without one."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(0), float(torch.cuda.mem_get_info()[0])


def memory_gib(device: str) -> dict[str, float]:
    """Return the GiB that torch's allocator holds now and held at its peak; nothing for the CPU."""
    if device == "cpu":
        return {}
    return {
        "allocated": torch.cuda.memory_allocated() / GIB,
        "reserved": torch.cuda.memory_reserved() / GIB,
        "peak_allocated": torch.cuda.max_memory_allocated() / GIB,
        "peak_reserved": torch.cuda.max_memory_reserved() / GIB,
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a GPU's memory is full; torch's allocator, a library's workspace or CUDA may raise it."""
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
