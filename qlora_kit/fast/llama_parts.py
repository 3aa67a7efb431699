"""Norms, projections and rotary table of a loaded Llama-like model, read for training and for decoding."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from transformers import PreTrainedModel

from qlora_kit.fast.llama_layer import Norms, Rotary
from qlora_kit.fast.peft_layers import is_plain
from qlora_kit.fast.projection import Lora
from qlora_kit.model.architecture import why_not_llama_like
from qlora_kit.model.llama_modules import projections_of, stack_biases
from qlora_kit.model.loss import decoder_and_head


class ProjectionGroup(NamedTuple):
    """Projections that share an input: q, k, v; o; gate, up; or down."""

    weights: tuple[Any, ...]  # Params4bit or plain tensors, (out_i, in)
    bias: torch.Tensor | None  # (Σ out_i,)
    sizes: tuple[int, ...]  # out_i
    lora: Lora | None
    gradients: Lora | None  # of lora; None in decoding


class Layer(NamedTuple):
    norms: Norms
    qkv: ProjectionGroup
    o: ProjectionGroup
    gate_up: ProjectionGroup
    down: ProjectionGroup


# From the modules of a group and their output sizes: the LoRA update, and where its gradients are added.
LoraReader = Callable[[list[Any], tuple[int, ...]], tuple[Lora | None, Lora | None]]


def read_layers(decoder: Any, read_lora: LoraReader) -> list[Layer]:
    """Return the layers of a decoder, in order; `read_lora` is called for each group in the order of `Layer`."""

    def read_group(modules: list[Any]) -> ProjectionGroup:
        bases = [getattr(module, "base_layer", module) for module in modules]
        sizes = tuple(base.out_features for base in bases)
        bias = stack_biases(bases, decoder.norm.weight)
        return ProjectionGroup(tuple(base.weight for base in bases), bias, sizes, *read_lora(modules, sizes))

    return [Layer(_read_norms(layer), *map(read_group, projections_of(layer))) for layer in decoder.layers]


def _read_norms(layer: Any) -> Norms:
    return Norms(
        attention=layer.input_layernorm.weight,
        mlp=layer.post_attention_layernorm.weight,
        q=getattr(getattr(layer.self_attn, "q_norm", None), "weight", None),
        k=getattr(getattr(layer.self_attn, "k_norm", None), "weight", None),
        epsilon=layer.input_layernorm.variance_epsilon,
    )


class LoraTensors(NamedTuple):
    """peft's LoRA update of one projection."""

    A: torch.nn.Parameter  # (rank, in)
    B: torch.nn.Parameter  # (out, rank)
    scale: float  # alpha / rank
    dropout: float


def lora_of(module: Any) -> LoraTensors | None:
    """Return the LoRA update of a projection that has one adapter; None when the projection is not adapted."""
    if not hasattr(module, "lora_A"):
        return None
    (name,) = module.active_adapters
    dropout = getattr(module.lora_dropout[name], "p", 0.0)  # an Identity when it is 0
    return LoraTensors(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name], dropout)


def read_rotary_table(decoder: Any, length: int, device: torch.device) -> Rotary:
    """Return the rotary table of positions 0 to length - 1, (length, head size)."""
    cos, sin = (part[0] for part in decoder.rotary_emb(decoder.norm.weight, torch.arange(length, device=device)[None]))
    first, second = sin.chunk(2, -1)
    return Rotary(cos, torch.cat([-first, second], -1))


def why_not_covered(model: PreTrainedModel | PeftModel, length: int) -> str | None:
    """Return why llama_layer.py does not describe a model's layers for texts of `length` tokens, or None if it does.

    Args:
        model: a causal language model, with or without PEFT around it.
    """
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "its weights are on several devices"
    reason, parts = why_not_llama_like(model.config.to_dict(), length), decoder_and_head(model)
    if reason or parts is None:
        return reason or "its output head is trained, or is more than a matrix product"
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not all(map(is_plain, adapted)):
        return "its adapter is a LoRA variant, has a LoRA bias, or is one of several"
    inside = sum(isinstance(module, LoraLayer) for module in parts[0].layers.modules())
    return None if inside == len(adapted) else "its adapter changes more than the decoder's projections"
