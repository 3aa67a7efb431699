"""Fold the adapter into a loaded model (--merged): every projection becomes a plain one in 16 bits, which answers faster.

As in `merge --base dequantized`, W + scale · B A is computed in fp32 and rounded once, here to the dtype that the model computes
in. The packed weights are freed one projection at a time, so that the adapter cannot be taken off again.
"""

import math
from typing import Any, cast

import bitsandbytes
import psutil
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_kit.config import GIB, ModelSettings
from qlora_kit.errors import UserError
from qlora_kit.model.hub import model_folder, read_config
from qlora_kit.model.weight_files import read_base

ANSWER_BYTES = GIB // 2  # keys, values and logits: a text of 4,000 tokens takes 0.14 GiB of keys and values at Qwen2.5-3B


def check_memory(model: ModelSettings, dtype: torch.dtype, device: str) -> None:
    """Check that the folded model will fit into the free memory; loads nothing.

    Raises:
        UserError: it will not, or the base model's files are damaged or already quantized.
    """
    folder = model_folder(model)
    if folder is None:
        return  # loading fails with the reason
    shapes = [stored.shape for stored in read_base(folder).values()]
    config = read_config(folder, model.name)
    vocabulary = config.get("text_config", config).get("vocab_size")
    largest = max(math.prod(shape) for shape in shapes if vocabulary not in shape)  # neither embedding nor head is folded
    needed = sum(map(math.prod, shapes)) * dtype.itemsize + largest * torch.float32.itemsize + ANSWER_BYTES
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if needed > free:
        where, name = "the GPU" if device == "cuda" else "memory", str(dtype).removeprefix("torch.")
        problem = f"needs {needed / GIB:.2f} GiB for {model.name} in {name}, and {free / GIB:.2f} GiB of {where} are free"
        raise UserError("--merged", None, problem, f"free {(needed - free) / GIB:.2f} GiB, or leave --merged out")


def fold(model: PeftModel) -> PreTrainedModel:
    """Return the base model with the adapter in its weights and nothing packed; `model` must not be used afterwards.

    Raises:
        UserError: a folded projection contains NaN or infinity.
    """
    base = cast(PreTrainedModel, model.get_base_model())
    replaced = [name for name, module in base.named_modules() if _is_replaced(name, module)]
    for name in replaced:  # by name: a list of modules would keep all packed weights until the end
        base.set_submodule(name, _folded(base.get_submodule(name), name))
    return base


def _is_replaced(name: str, module: torch.nn.Module) -> bool:
    inside = name.endswith(".base_layer")  # of a LoRA layer, which is replaced as a whole
    return isinstance(module, LoraLayer) or (isinstance(module, bitsandbytes.nn.Linear4bit) and not inside)


def _folded(module: Any, name: str) -> torch.nn.Linear:  # a LoraLayer, which is a mixin, or a Linear4bit
    layer: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
    dtype: Any = layer.compute_dtype if isinstance(layer, bitsandbytes.nn.Linear4bit) else layer.weight.dtype
    exact = _exact_weight(layer)  # (out, in)
    for adapter in module.active_adapters if isinstance(module, LoraLayer) else ():
        A, B = (matrices[adapter].weight.detach().float() for matrices in (module.lora_A, module.lora_B))  # (r, in), (out, r)
        exact.addmm_(B, A, alpha=module.scaling[adapter])
    plain = torch.nn.Linear(exact.shape[1], exact.shape[0], bias=False, device="meta")
    plain.weight = torch.nn.Parameter(round_merged(exact, dtype, name), requires_grad=False)
    plain.bias = layer.bias
    return plain


def _exact_weight(layer: Any) -> torch.Tensor:
    """Return a copy of a projection's weight in fp32, (out, in)."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return dequantize(layer.weight)
    exact = layer.weight.detach().to(torch.float32, copy=True)
    return exact.T if isinstance(layer, Conv1D) else exact


def round_merged(exact: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Round a merged tensor from fp32 to `dtype`.

    Raises:
        UserError: it contains NaN or infinity in `dtype`.
    """
    merged = exact.to(dtype)
    if not merged.isfinite().all():
        problem = f"contains NaN or infinity after merging, in {str(dtype).removeprefix('torch.')}"
        raise UserError(name, None, problem, "merge an adapter that was trained with a lower --learning_rate")
    return merged


def dequantize(packed: Any) -> torch.Tensor:
    """Return a Params4bit as (out, in) in fp32, on its device; it must not be used for products afterwards."""
    state, shape = packed.quant_state, packed.quant_state.shape
    state.dtype = torch.float32
    if shape.numel() % state.blocksize == 0:  # as rows of one block: other lengths are dequantized wrongly on some processors
        state.shape = torch.Size((shape.numel() // state.blocksize, state.blocksize))
    unpacked = bitsandbytes.functional.dequantize_4bit(packed.data, state).view(shape)
    state.shape = shape
    return unpacked
