"""Where a loaded Llama-like model keeps its projections."""

from typing import Any

import torch

from qlora_kit.planning.shape import LLAMA_LIKE


def projections_of(layer: Any) -> list[list[Any]]:
    """Its projections, those that share an input together: q, k, v; o; gate, up; down."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj],
    ]  # fmt: skip


def stacked_bias(bases: list[Any], like: torch.Tensor) -> torch.Tensor | None:
    """One bias of all, zero where one has none, in the dtype and place of `like`; None where none has one."""
    if all(base.bias is None for base in bases):
        return None
    return torch.cat([like.new_zeros(base.out_features) if base.bias is None else base.bias.to(like) for base in bases])


def why_not_llama_like(model_config: dict[str, Any], length: int) -> str | None:
    """The reason in a config.json why fast/layer.py is not this model's layer for blocks of `length` tokens, or None."""
    if model_config.get("model_type") not in LLAMA_LIKE:
        return f"{model_config.get('model_type')} is not built like Llama"
    window = model_config.get("sliding_window") if model_config.get("use_sliding_window", True) else None
    if window and window < length:
        return f"its attention reaches {window} tokens back, less than a block of {length}"
    if model_config.get("hidden_act", "silu") != "silu":
        return f"its activation is {model_config['hidden_act']}"
    return "it drops out in the attention" if model_config.get("attention_dropout") else None
