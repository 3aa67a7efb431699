"""Causal attention within the records of a packed block, by torch's own kernels.

`starts`, (B, T), describes a packed block: for each position, the index at which its record begins. Position i attends to
positions starts[i] to i and is counted from starts[i], with the angles that a text of its record's length has, so a record is
computed as if it were alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from qlora_kit.fast.llama_layer import Heads, Rotary
from qlora_kit.model.records import positions, record_lengths, record_mask


class RotaryTables(NamedTuple):
    """Rotary tables of a block's positions, (T, head size).

    Attributes:
        short: of the positions in texts that have other angles because they are short, (longest of them, head size).
    """

    whole: Rotary
    short: Rotary | None = None


class BlockLayout(NamedTuple):
    """Positions of the tokens in the blocks of a micro-batch."""

    batch: int  # blocks
    rotary: Rotary
    mask: torch.Tensor | None  # (B, 1, T, T), added to the scores; None: causal attention over the whole block


def lay_out_blocks(batch: int, tables: RotaryTables, starts: torch.Tensor | None) -> BlockLayout:
    """Return the layout of blocks that are one text each (`starts` is None) or hold records."""
    if starts is None:
        return BlockLayout(batch, tables.whole, None)
    at = positions(starts)
    rotary = [table[at] for table in tables.whole]
    if tables.short:
        is_short = (record_lengths(starts) <= len(tables.short.cos))[..., None]
        own = [table[at.clamp(max=len(table) - 1)] for table in tables.short]
        rotary = [torch.where(is_short, a, b) for a, b in zip(own, rotary, strict=True)]
    return BlockLayout(batch, Rotary(*(table[:, None] for table in rotary)), record_mask(starts, tables.whole.cos.dtype))


def attend(heads: Heads, mask: torch.Tensor | None, differentiable: bool) -> torch.Tensor:
    """Return the attention's output, (batch, heads, length, size).

    Args:
        differentiable: whether autograd records the attention, so that the output leads back to q, k and v.
    """
    q, k, v = heads
    with torch.set_grad_enabled(differentiable):
        for tensor in heads:
            tensor.requires_grad_(differentiable)
        queries_per_key = q.shape[1] // k.shape[1]
        # Without flash attention, which takes no mask, torch computes grouped heads with (length, length) tensors only.
        if queries_per_key > 1 and (mask is not None or not _has_flash(q)):
            k, v = k.repeat_interleave(queries_per_key, 1), v.repeat_interleave(queries_per_key, 1)
            queries_per_key = 1
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=queries_per_key > 1)


def _has_flash(q: torch.Tensor) -> bool:
    return q.is_cuda and q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device)[0] >= 8
