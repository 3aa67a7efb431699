"""Where a loaded Llama-like model keeps what its layers need, for training (decoder.py) and for decoding (decode.py)."""

from typing import Any

import torch

from qlora_kit.fast.llama_layer import Norms, Rotary


def norms_of(layer: Any) -> Norms:
    return Norms(
        attention=layer.input_layernorm.weight,
        mlp=layer.post_attention_layernorm.weight,
        q=getattr(getattr(layer.self_attn, "q_norm", None), "weight", None),
        k=getattr(getattr(layer.self_attn, "k_norm", None), "weight", None),
        epsilon=layer.input_layernorm.variance_epsilon,
    )


def rotary_table(decoder: Any, length: int, device: torch.device) -> Rotary:
    """Of positions 0 to length, (length, head size)."""
    cos, sin = (part[0] for part in decoder.rotary_emb(decoder.norm.weight, torch.arange(length, device=device)[None]))
    first, second = sin.chunk(2, -1)
    return Rotary(cos, torch.cat([-first, second], -1))
