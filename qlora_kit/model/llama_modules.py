"""Where a loaded Llama-like model keeps its projections."""

from typing import Any

import torch


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
