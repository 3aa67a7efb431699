"""Where a base model goes: onto one device, or over several GPUs of this machine where the first cannot hold it.

A layer lies whole on one GPU, and a text passes through the layers one after the other: several GPUs hold more and are no faster.
accelerate divides the layers and moves what passes between them. Covers what memory.py knows the shape of; other models
go onto the first GPU.
"""

from pathlib import Path
from typing import Any, Literal

import torch

from qlora_kit.config import GIB, ModelSettings, QuantizationSettings
from qlora_kit.errors import UserError
from qlora_kit.model.hub import read_json
from qlora_kit.model.load import DeviceMap, build_skeleton, pack_skeleton
from qlora_kit.planning.shape import BYTES_4BIT, BYTES_4BIT_DOUBLE, ModelShape, read_shape

TEXT_TOKENS = 4096  # of the texts under way at once, whose keys and values find room on every GPU, whichever layers it has
WORK_BYTES = GIB // 2  # activations, logits, libraries
BYTES_INT4 = 0.5  # what accelerate counts for a packed weight, without its absmax


def choose_device_map(
    folder: Path, model: ModelSettings, quantization: QuantizationSettings, dtype: torch.dtype, device: str, wanted: str = "auto"
) -> tuple[DeviceMap, str | None]:
    """The `device_map` to load a model with, and one line where it is not what it would be on an empty machine.

    Args:
        folder: with its config.json; no weights are read.
        device: cuda or cpu.
        wanted: `auto` takes several GPUs where the first has no room; `one` takes the first, room or not.

    Raises:
        UserError: all GPUs together have no room for it.
    """
    shape = read_shape(read_json(folder / "config.json", "model.name"))
    if device == "cpu" or wanted == "one" or shape is None:
        return {"": 0 if device == "cuda" else device}, None
    weights, room = needed_bytes(shape, quantization, dtype.itemsize)
    free = _free_memory(1)  # asking a GPU takes CUDA's context on it
    if fits(weights, room, free) != "one":
        free = _free_memory(torch.cuda.device_count())
    places, missing = fits(weights, room, free), missing_bytes(weights, room, free)
    if places == "one":
        return {"": 0}, None
    if places == "several":
        skeleton = build_empty(folder, model, dtype, quantization.load_in_4bit)
        device_map, missing = spread(skeleton, [there - room for there in free], _packed_bytes(quantization))
        if not missing:
            return device_map, _say(model.name, device_map, free[0])
    how = "4 bits" if quantization.load_in_4bit else str(dtype).removeprefix("torch.")
    raise UserError(
        f"model.name: {model.name}: takes {weights / GIB:.2f} GiB in {how} and {room / GIB:.2f} GiB beside them on each GPU; "
        f"{' + '.join(f'{there / GIB:.2f}' for there in free)} GiB are free: {missing / GIB:.2f} GiB missing; "
        "free them, use --device cpu, or insist on the first GPU: --device_map one"
    )


def needed_bytes(shape: ModelShape, quantization: QuantizationSettings, element: int) -> tuple[float, float]:
    """Bytes of all weights, and of what a GPU needs beside its part: keys and values, a projection unpacked, and the rest.

    Args:
        element: bytes of a number that is not packed.
    """
    packed = _packed_bytes(quantization) if quantization.load_in_4bit else element
    plain = shape.embedding_parameters() + shape.other_parameters()
    cached = 2 * shape.layers * shape.kv_heads * shape.head_size * TEXT_TOKENS
    unpacked = max(fan_in * fan_out for fan_in, fan_out in shape.projections().values())
    return packed * shape.projection_parameters() + element * plain, element * (cached + unpacked) + WORK_BYTES


def _packed_bytes(quantization: QuantizationSettings) -> float:
    return BYTES_4BIT_DOUBLE if quantization.use_double_quant else BYTES_4BIT


def fits(weights: float, room: float, free: list[float]) -> Literal["one", "several", "none"]:
    """On how many GPUs there is room, by sizes in bytes; that layers are not divided may still leave one over.

    Args:
        room: that each GPU with a part of the weights needs beside it.
        free: of each GPU.
    """
    if weights + room <= free[0]:
        return "one"
    return "none" if missing_bytes(weights, room, free) else "several"


def missing_bytes(weights: float, room: float, free: list[float]) -> float:
    """How much more must be free; a GPU that has not even `room` counts only where none has."""
    budget = sum(there - room for there in free if there > room) or max(free) - room
    return max(0.0, weights - budget)


def _free_memory(gpus: int) -> list[float]:
    return [float(torch.cuda.mem_get_info(number)[0]) for number in range(gpus)]


def build_empty(folder: Path, model: ModelSettings, dtype: torch.dtype, packed: bool) -> Any:
    """The model without weights, its projections `packed` as loading packs them."""
    skeleton: Any = build_skeleton(folder, model)
    skeleton.to(dtype)
    if packed:
        pack_skeleton(skeleton)
    return skeleton


def spread(skeleton: Any, budgets: list[float], packed_bytes: float) -> tuple[DeviceMap, float]:
    """Layers over GPUs, and bytes of those for which none has room.

    Evenly, which leaves room for long texts everywhere; where that leaves a layer over, each GPU is filled up.

    Args:
        skeleton: a model without weights.
        budgets: bytes of weights that each GPU may hold.
        packed_bytes: of a weight in 4 bits.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import CustomDtype, compute_module_sizes, get_balanced_memory
    from bitsandbytes.nn import Linear4bit

    packed = {f"{name}.weight": CustomDtype.INT4 for name, module in skeleton.named_modules() if isinstance(module, Linear4bit)}
    scale = BYTES_INT4 / packed_bytes if packed else 1.0  # what is not packed is counted too large by as much
    most = {number: max(0, int(scale * budget)) for number, budget in enumerate(budgets)}
    how: dict[str, Any] = {"no_split_module_classes": list(skeleton._no_split_modules or ()), "special_dtypes": packed}
    even = infer_auto_device_map(skeleton, max_memory=get_balanced_memory(skeleton, max_memory=dict(most), **how), **how)
    found = even if "disk" not in even.values() else infer_auto_device_map(skeleton, max_memory=dict(most), **how)
    sizes = compute_module_sizes(skeleton, special_dtypes=packed)
    return dict(found), sum(sizes[name] for name, place in found.items() if place == "disk") / scale


def _say(name: str, device_map: DeviceMap, free: float) -> str:
    gpus = set(device_map.values())
    where = f"spread over {len(gpus)} GPUs" if len(gpus) > 1 else f"loaded onto GPU {gpus.pop()}"
    return f"{name} does not fit into the {free / GIB:.2f} GiB that are free on the first GPU: {where}"
