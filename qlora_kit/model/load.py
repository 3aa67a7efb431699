"""Load a base model in 4 bits, with bitsandbytes' CPU fixes."""

import copy
import functools
import math
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import dot_natural_key

from qlora_kit.config import ModelSettings, QuantizationSettings
from qlora_kit.errors import UserError
from qlora_kit.model.device import is_out_of_memory
from qlora_kit.model.hub import fetch_weights, read_config
from qlora_kit.model.packed_base import read_packed
from qlora_kit.model.skeleton import build_skeleton, class_to_load, modules_to_skip, not_loadable
from qlora_kit.model.weight_files import StoredTensor, read_headers

DeviceMap = dict[str, int | str]  # module -> number of its GPU, or cpu; the module "" is the whole model
SPARE = 2**27  # numbers that a model may have beyond its files: half a GiB at most in fp32, and a mask of 10,000 positions
COMPUTED = re.compile(r"(?:inv_freq|position_ids|masked_bias)$")  # buffers that a model computes, in files or not
# Tokens that models reserve for padding, in the order in which they are tried.
PADDING_TOKENS = [
    "<|endoftext|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<unk>",
]


def quantization_config(settings: QuantizationSettings, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return the settings as bitsandbytes takes them; None if they keep the weights in 16 bits.

    Args:
        dtype: weights are dequantized to it for every product.
    """
    if not settings.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quant_type,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=settings.use_double_quant,
    )


def load_base_model(
    name: str | Path,
    quantization: BitsAndBytesConfig | None,
    *,
    device: str | DeviceMap,
    dtype: torch.dtype,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model, its projections packed to 4 bits one by one.

    A model whose files are packed already stays as it is; only the dtype that it computes in is set.

    Args:
        name: a folder or a Hub name.
        quantization: None loads the weights as they are in the files.
        device: cuda, cpu, or the device of each module.
        dtype: of everything that is not packed: norms, embeddings, biases.

    Raises:
        UserError: the weights cannot be loaded, the model is no causal language model, its files lack a tensor or have one of
            another shape, are packed otherwise, nothing of it can be packed, or bitsandbytes would dequantize its weights wrongly
            on this processor.
    """
    settings = ModelSettings(name=str(name), revision=revision, trust_remote_code=trust_remote_code)
    folder = fetch_weights(settings)
    packed = read_packed(read_config(folder, name), name)
    if packed and quantization:
        check_same(quantization, packed, name)
    skeleton = build_skeleton(settings)
    check_size(skeleton, read_headers(folder).values(), packed is not None, name)
    packing: dict[str, Any] = {}
    if quantization and not packed:
        packing["quantization_config"] = copy.copy(quantization)
        packing["quantization_config"].llm_int8_skip_modules = modules_to_skip(skeleton)
    try:
        model, report = class_to_load(skeleton).from_pretrained(
            os.path.expanduser(name),
            dtype=dtype,
            device_map={"": 0 if device == "cuda" else device} if isinstance(device, str) else device,
            use_safetensors=True,  # no pickle, even in a folder that holds both
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # check_complete names those that differ
            output_loading_info=True,
            **packing,  # left out for a model that is packed already: None would hide its own settings
        )
    except SafetensorError as error:
        raise UserError("model.name", name, f"has damaged weights ({error})", "copy or download them again") from error
    except Exception as error:  # whatever the library and the model's own code refuse
        if is_out_of_memory(error) or isinstance(error, MemoryError):
            raise
        raise not_loadable(name, error) from error
    check_complete(model, report, name)
    model.unused_tensors = sorted(report["unexpected_keys"], key=dot_natural_key)
    if quantization or packed:
        check_packed(model, name)
    if packed:
        for module in _packed_layers(model):
            module.compute_dtype = quantization.bnb_4bit_compute_dtype if quantization else dtype
    guard_cpu_kernels(model, name)
    return model


def check_size(skeleton: PreTrainedModel, stored: Collection[StoredTensor], packed: bool, name: str | Path) -> None:
    """Check, before memory is taken, that a model is not much larger than its files.

    Args:
        skeleton: the model without its weights.
        packed: whether its config.json says that its files are in 4 bits.

    Raises:
        UserError: it is, so that its config.json is another model's; or no file is in 4 bits.
    """
    is_byte = [tensor.dtype in ("U8", "I8") for tensor in stored]
    held = sum(math.prod(tensor.shape) * (1 + byte) for tensor, byte in zip(stored, is_byte, strict=True))  # two weights a byte
    needed = sum(tensor.numel() for tensor in (*skeleton.parameters(), *skeleton.buffers()))
    if needed > 2 * held + SPARE:  # buffers and tied weights are in no file
        problem = f"holds {held:,} numbers in its files, and its config.json makes a model of {needed:,}"
        raise UserError("model.name", name, problem, "restore its config.json, or copy or download the model again")
    if packed and not any(is_byte):
        problem = "has a quantization_config in its config.json, and weights that are not packed"
        raise UserError("model.name", name, problem, "remove it from config.json, or copy or download the model again")


def check_same(quantization: BitsAndBytesConfig, packed: dict[str, Any], name: str | Path) -> None:
    """Check that weights are packed as they should be loaded; raises UserError if not.

    Args:
        packed: as read_packed.
    """
    wanted = {"quant_type": quantization.bnb_4bit_quant_type, "use_double_quant": quantization.bnb_4bit_use_double_quant}
    for key, value in wanted.items():
        if value != packed[key]:
            problem = f"contradicts the files of {name}, which are packed already with {key} {packed[key]}"
            raise UserError(f"quantization.{key}", value, problem, "leave quantization out, or use the 16-bit model")


def check_complete(model: PreTrainedModel, report: dict[str, Any], base: str | Path) -> None:
    """Check that every tensor of a model came from its files; the library fills in random numbers for one that did not.

    Args:
        report: of from_pretrained, which leaves out tied weights and what the model's class declares to be dispensable.

    Raises:
        UserError: the files lack a tensor, or have one of another shape.
    """
    layers: dict[str, Any] = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    unscaled = [tensor for tensor, layer in layers.items() if getattr(layer.weight, "quant_state", None) is None]
    missing = {tensor for tensor in report["missing_keys"] if not COMPUTED.search(tensor)}.union(unscaled)
    differing: dict[str, tuple[Any, Any]] = {tensor: (found, expected) for tensor, found, expected in report["mismatched_keys"]}
    if not unscaled:  # the library compares no shape of a packed weight
        shapes = {tensor: (tuple(layer.weight.quant_state.shape), _shape(layer)) for tensor, layer in layers.items()}
        differing |= {tensor: both for tensor, both in shapes.items() if both[0] != both[1]}
    if missing:
        problem = f"has no {_list(sorted(missing, key=dot_natural_key))} in its files"
        raise UserError("model.name", base, problem, "copy or download the model again")
    if differing:
        first = min(differing, key=dot_natural_key)
        found, expected = (" x ".join(map(str, shape)) for shape in differing[first])
        more = f", as {len(differing) - 1} more differ" if len(differing) > 1 else ""
        problem = f"has {first} of {found} in its files, and its config.json makes it {expected}{more}"
        raise UserError("model.name", base, problem, "restore its config.json, or copy or download the model again")


def describe_unused(model: Any, name: str) -> str | None:
    """Return a line about tensors in the files of a loaded model that its config.json has no place for, or None."""
    unused = getattr(model, "unused_tensors", [])
    return f"The files of {name} hold {len(unused)} tensors that the model does not use: {_list(unused)}" if unused else None


def check_packed(model: PreTrainedModel, name: str | Path) -> None:
    """Check that packing found something to pack in a loaded model, or in a packed skeleton; raises UserError if not."""
    if not _packed_layers(model):
        problem = f"packs no projection of {name}: bitsandbytes finds no linear layer in it"
        raise UserError("quantization.load_in_4bit", True, problem, "use false, which trains on 16-bit weights, or another model")


def _packed_layers(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def _shape(layer: Any) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def set_padding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Choose a padding token that ends no turn: if labels are masked by its id, a model never learns to stop."""
    end = tokenizer.eos_token
    if tokenizer.pad_token in (None, end):
        known = tokenizer.get_vocab()
        candidates = [token for token in [*PADDING_TOKENS, *tokenizer.all_special_tokens] if token in known and token != end]
        # GPT-2 has one special token only, which ends a text and no turn; our masks go by position, so it may pad as well.
        tokenizer.pad_token = candidates[0] if candidates else end
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def check_context(model: PreTrainedModel, length: int) -> None:
    """Check that the model has a position for each token of a block; a longer block gives nonsense, not an error.

    Args:
        length: tokens of a block.

    Raises:
        UserError: it has not.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and length > positions:
        raise UserError(
            "data.max_length", length, f"is more than the base model's {positions} positions", f"use {positions} or less"
        )


def guard_cpu_kernels(model: PreTrainedModel, name: str | Path) -> None:
    """Keep the packed layers of a loaded model from two faults of bitsandbytes 0.50.2 on a CPU.

    On processors with AVX512-BF16 it repacks weights for good at the first evaluation, into a layout whose product is in bfloat16
    and has no gradient: training after an evaluation fails, or silently leaves out the gradient of the base product
    (Linear4bit.forward). On processors with AVX-512 it dequantizes rows wrongly whose length is a multiple of 16 and not of 64.

    Raises:
        UserError: it dequantizes rows of this model wrongly on this processor.
    """
    packed = _packed_layers(model)
    for module in packed:
        module.support_avx512bf16_for_cpu = False
    for length in {module.in_features for module in packed if module.weight.device.type == "cpu"}:
        if not dequantizes_correctly(length):
            problem = f"has rows of {length} weights, which bitsandbytes dequantizes wrongly on this processor"
            raise UserError("model.name", name, problem, "use a GPU, or quantization.load_in_4bit: false")


@functools.cache
def dequantizes_correctly(length: int) -> bool:
    """Return whether the CPU kernel gives, for rows of `length` weights, each code's level times its block's absmax."""
    values = torch.linspace(-1.0, 1.0, 64 * length).view(64, length)
    packed, state = bitsandbytes.functional.quantize_4bit(values, quant_type="nf4", blocksize=64)
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[: values.numel()].long()
    expected = state.code[codes] * state.absmax.repeat_interleave(64)
    return torch.allclose(bitsandbytes.functional.dequantize_4bit(packed, state), expected.view_as(values), atol=1e-6)
