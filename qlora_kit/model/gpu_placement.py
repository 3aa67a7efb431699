"""Place a base model on one GPU, or its layers on several if the first cannot hold it.

No layer is divided, and a text passes through the layers one after the other: several GPUs hold more and are no faster.
accelerate distributes the layers and moves activations between GPUs. A model that planning/shape.py does not know goes to the
first GPU.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import CustomDtype, compute_module_sizes, get_balanced_memory
from bitsandbytes.nn import Linear4bit
from transformers import PreTrainedModel

from qlora_kit.config import GIB, ModelSettings, QuantizationSettings
from qlora_kit.errors import UserError
from qlora_kit.model.hub import read_config
from qlora_kit.model.load import DeviceMap
from qlora_kit.model.skeleton import build_skeleton, pack_skeleton
from qlora_kit.planning.shape import BYTES_4BIT, BYTES_4BIT_DOUBLE, ModelShape, read_shape

TEXT_TOKENS = 4096  # of all texts answered at once; every GPU keeps room for their keys and values, whichever layers it has
WORK_BYTES = GIB // 2  # activations, logits, libraries
BYTES_INT4 = 0.5  # what accelerate counts for a packed weight, without its absmax


def choose_device_map(
    folder: Path, model: ModelSettings, quantization: QuantizationSettings, dtype: torch.dtype, device: str, wanted: str = "auto"
) -> tuple[DeviceMap, str | None]:
    """Return the device of each module, and a note if the first GPU has no room.

    Args:
        folder: the base model's folder; no weights are read.
        device: cuda or cpu.
        wanted: `auto` takes several GPUs if the first has no room; `one` always takes the first.

    Raises:
        UserError: all GPUs together have no room for the model.
    """
    shape = read_shape(read_config(folder, model.name))
    if device == "cpu" or wanted == "one" or shape is None:
        return {"": 0 if device == "cuda" else device}, None
    weights, room = needed_bytes(shape, quantization, dtype.itemsize)
    free = _free_memory(1)  # reading a GPU's memory creates a CUDA context on it
    if fits(weights, room, free) != "one":
        free = _free_memory(torch.cuda.device_count())
    places, missing = fits(weights, room, free), missing_bytes(weights, room, free)
    if places == "one":
        return {"": 0}, None
    if places == "several":
        skeleton = build_empty(model, dtype, quantization.load_in_4bit)
        device_map, missing = spread(skeleton, [gpu - room for gpu in free], _packed_bytes(quantization))
        if not missing:
            return device_map, _describe(model.name, device_map, free[0])
    form = "4 bits" if quantization.load_in_4bit else str(dtype).removeprefix("torch.")
    problem = (
        f"needs {weights / GIB:.2f} GiB in {form} and {room / GIB:.2f} GiB more on each GPU, and "
        f"{' + '.join(f'{gpu / GIB:.2f}' for gpu in free)} GiB are free"
    )
    remedy = f"free {missing / GIB:.2f} GiB, use --device cpu, or force the first GPU with --device_map one"
    raise UserError("model.name", model.name, problem, remedy)


def needed_bytes(shape: ModelShape, quantization: QuantizationSettings, element: int) -> tuple[float, float]:
    """Return the bytes of all weights, and those that each GPU needs in addition: keys and values, an unpacked projection, work.

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
    """Return on how many GPUs there is room, if layers could be divided at will.

    Args:
        weights: bytes of all weights.
        room: bytes that each GPU with weights needs in addition.
        free: bytes free on each GPU.
    """
    if weights + room <= free[0]:
        return "one"
    return "none" if missing_bytes(weights, room, free) else "several"


def missing_bytes(weights: float, room: float, free: list[float]) -> float:
    """Return how many more bytes must be free; a GPU with less than `room` counts only if all have less."""
    budget = sum(gpu - room for gpu in free if gpu > room) or max(free) - room
    return max(0.0, weights - budget)


def _free_memory(gpus: int) -> list[float]:
    return [float(torch.cuda.mem_get_info(number)[0]) for number in range(gpus)]


def build_empty(model: ModelSettings, dtype: torch.dtype, packed: bool) -> PreTrainedModel:
    """Return the model without weights, its projections packed as loading packs them if `packed`."""
    skeleton: Any = build_skeleton(model)
    skeleton.to(dtype)
    if packed:
        pack_skeleton(skeleton)
    return skeleton


def spread(skeleton: PreTrainedModel, budgets: list[float], packed_bytes: float) -> tuple[DeviceMap, float]:
    """Distribute the layers over the GPUs.

    Evenly, which leaves room for long texts on every GPU; if a layer then finds no GPU, each GPU is filled up.

    Args:
        skeleton: a model without weights.
        budgets: bytes of weights that each GPU may hold.
        packed_bytes: bytes of a weight in 4 bits.

    Returns:
        The device of each module, and the bytes of the layers for which no GPU has room.
    """
    packed = {f"{name}.weight": CustomDtype.INT4 for name, module in skeleton.named_modules() if isinstance(module, Linear4bit)}
    scale = BYTES_INT4 / packed_bytes if packed else 1.0  # weights that are not packed are counted too large by that factor
    most = {number: max(0, int(scale * budget)) for number, budget in enumerate(budgets)}
    rules: dict[str, Any] = {"no_split_module_classes": list(skeleton._no_split_modules or ()), "special_dtypes": packed}
    even = infer_auto_device_map(skeleton, max_memory=get_balanced_memory(skeleton, max_memory=dict(most), **rules), **rules)
    found = even if "disk" not in even.values() else infer_auto_device_map(skeleton, max_memory=dict(most), **rules)
    sizes = compute_module_sizes(skeleton, special_dtypes=packed)
    return dict(found), sum(sizes[name] for name, place in found.items() if place == "disk") / scale


def _describe(name: str, device_map: DeviceMap, free: float) -> str:
    gpus = set(device_map.values())
    where = f"spread over {len(gpus)} GPUs" if len(gpus) > 1 else f"loaded onto GPU {gpus.pop()}"
    return f"{name} does not fit into the {free / GIB:.2f} GiB that are free on the first GPU: {where}"
