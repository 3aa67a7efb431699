"""Causal attention within the records of a packed block, by torch's own kernels.

`starts`, (B, T), describes a packed block: for each position, the index at which its record begins. Position i attends to
positions starts[i] to i and is counted from starts[i], so a record is computed as if it were alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from qlora_kit.fast.llama_layer import Heads, Rotary
from qlora_kit.model.loss import positions, record_mask


class BlockLayout(NamedTuple):
    """Positions of the tokens in the blocks of a micro-batch."""

    batch: int  # blocks
    rotary: Rotary
    mask: torch.Tensor | None  # (B, 1, T, T), added to the scores; None: causal attention over the whole block


def lay_out_blocks(batch: int, rotary: Rotary, starts: torch.Tensor | None) -> BlockLayout:
    """Return the layout of blocks that are one record each (`starts` is None) or packed.

    Args:
        rotary: the table of positions 0 to T - 1, (T, head size).
    """
    if starts is None:
        return BlockLayout(batch, rotary, None)
    at = positions(starts)
    return BlockLayout(batch, Rotary(rotary.cos[at][:, None], rotary.sin[at][:, None]), record_mask(starts, rotary.cos.dtype))


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
