"""Projections of a loaded Llama-like model."""

from typing import Any

import torch


def projections_of(layer: Any) -> list[list[Any]]:
    """Return the projections of a decoder layer, grouped by their input: q, k, v; o; gate, up; down."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj],
    ]  # fmt: skip


def stack_biases(bases: list[Any], like: torch.Tensor) -> torch.Tensor | None:
    """Concatenate the biases, zero for a missing one, in the dtype and on the device of `like`; None if all are missing."""
    if all(base.bias is None for base in bases):
        return None
    return torch.cat([like.new_zeros(base.out_features) if base.bias is None else base.bias.to(like) for base in bases])
