"""An adapter folded into a model that is loaded: every projection a plain one in 16 bits, for answers that take fewer products.

As with `merge --base dequantized`, W + scale · B A is computed in fp32 and rounded once, here to the dtype that the model
computes in. The packed weights are given up one projection at a time, so nobody can take the adapter off again.
"""

import math
from typing import Any

import bitsandbytes
import psutil
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_kit.config import GIB, ModelSettings
from qlora_kit.errors import UserError
from qlora_kit.model.hub import model_folder, read_json
from qlora_kit.model.weight_files import read_base

ANSWER_BYTES = GIB // 2  # keys, values and logits: a text of 4,000 tokens takes 0.14 GiB of keys and values at Qwen2.5-3B


def check_memory(model: ModelSettings, dtype: torch.dtype, device: str) -> None:
    """Compare what the folded model will take with what is free; nothing is loaded.

    Raises:
        UserError: there is no room for it, or the base model's files are damaged or already quantized.
    """
    folder = model_folder(model)
    if folder is None:
        return  # loading will say why
    shapes = [stored.shape for stored in read_base(folder).values()]
    vocabulary = read_json(folder / "config.json", "model.name").get("vocab_size")
    largest = max(math.prod(shape) for shape in shapes if vocabulary not in shape)  # of what is folded: no embedding, no head
    needed = sum(map(math.prod, shapes)) * dtype.itemsize + largest * torch.float32.itemsize + ANSWER_BYTES
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"--merged: {model.name} takes {needed / GIB:.2f} GiB in {str(dtype).removeprefix('torch.')}, and "
            f"{free / GIB:.2f} GiB of {'the GPU' if device == 'cuda' else 'memory'} are free: "
            f"{(needed - free) / GIB:.2f} GiB missing; leave --merged out, or free them"
        )


def fold(model: PeftModel) -> PreTrainedModel:
    """The base model with the adapter in its weights and nothing packed; `model` is used up.

    Raises:
        UserError: folded, a projection holds values that are no numbers.
    """
    base: Any = model.get_base_model()
    replaced = [name for name, module in base.named_modules() if _is_replaced(name, module)]
    for name in replaced:  # by name: a list of modules would keep all that is packed until the end
        base.set_submodule(name, _folded(base.get_submodule(name), name))
    return base


def _is_replaced(name: str, module: torch.nn.Module) -> bool:
    inside = name.endswith(".base_layer")  # of a LoRA layer, which is replaced whole
    return isinstance(module, LoraLayer) or (isinstance(module, bitsandbytes.nn.Linear4bit) and not inside)


def _folded(module: Any, name: str) -> torch.nn.Linear:
    layer = module.get_base_layer() if isinstance(module, LoraLayer) else module
    kept: Any = layer.compute_dtype if isinstance(layer, bitsandbytes.nn.Linear4bit) else layer.weight.dtype
    exact = _exact(layer)  # (out, in)
    for adapter in module.active_adapters if isinstance(module, LoraLayer) else ():
        A, B = (part[adapter].weight.detach().float() for part in (module.lora_A, module.lora_B))  # (r, in), (out, r)
        exact.addmm_(B, A, alpha=module.scaling[adapter])
    plain: Any = torch.nn.Linear(exact.shape[1], exact.shape[0], bias=False, device="meta")
    plain.weight = torch.nn.Parameter(rounded(exact, kept, name), requires_grad=False)
    plain.bias = layer.bias
    return plain


def _exact(layer: Any) -> torch.Tensor:
    """A projection's weight in fp32, (out, in), whatever it lies in; a copy."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return unpack(layer.weight)
    exact = layer.weight.detach().to(torch.float32, copy=True)
    return exact.T if isinstance(layer, Conv1D) else exact


def rounded(exact: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A merged tensor, fp32, in the dtype that is kept.

    Raises:
        UserError: it holds values that are no numbers there.
    """
    merged = exact.to(dtype)
    if not merged.isfinite().all():
        raise UserError(
            f"{name}: merged, it holds values that are no numbers in {str(dtype).removeprefix('torch.')}; "
            "merge an adapter that was trained with a lower --learning_rate"
        )
    return merged


def unpack(packed: Any) -> torch.Tensor:
    """A packed weight as (out, in) in fp32, where it lies; it is not to be used for products afterwards."""
    state, shape = packed.quant_state, packed.quant_state.shape
    state.dtype = torch.float32
    if shape.numel() % state.blocksize == 0:  # as rows of one block: other lengths go wrong on some processors
        state.shape = torch.Size((shape.numel() // state.blocksize, state.blocksize))
    unpacked = bitsandbytes.functional.dequantize_4bit(packed.data, state).view(shape)
    state.shape = shape
    return unpacked
