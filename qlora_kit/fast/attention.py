"""Causal attention of grouped heads by torch's own kernels, within records where a block holds several.

A packed block is told by `starts`, (B, T): the index at which each position's record begins. Position i looks at starts[i] to i,
and counts its own position from there, so that a record is computed as if it stood alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from qlora_kit.fast.llama_layer import Heads, Rotary
from qlora_kit.model.loss import positions, record_mask


class Places(NamedTuple):
    """Where the tokens of a micro-batch stand."""

    batch: int
    rotary: Rotary
    mask: torch.Tensor | None  # (B, 1, T, T), what is added to the scores; None: causal and nothing else


def places(batch: int, rotary: Rotary, starts: torch.Tensor | None) -> Places:
    """Of a rotary table, (T, head size), for blocks that are one record each (None), or packed."""
    if starts is None:
        return Places(batch, rotary, None)
    at = positions(starts)
    return Places(batch, Rotary(rotary.cos[at][:, None], rotary.sin[at][:, None]), record_mask(starts, rotary.cos.dtype))


def attend(heads: Heads, mask: torch.Tensor | None, differentiable: bool) -> torch.Tensor:
    """(batch, heads, length, size); `differentiable` leaves autograd's record from q, k, v to the result."""
    q, k, v = heads
    with torch.set_grad_enabled(differentiable):
        for part in heads:
            part.requires_grad_(differentiable)
        shared = q.shape[1] // k.shape[1]  # heads of q that look at the same k and v
        # Without flash attention, which takes no mask, torch serves them with (length, length) tensors only.
        if shared > 1 and (mask is not None or not _has_flash(q)):
            k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
            shared = 1
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=shared > 1)


def _has_flash(q: torch.Tensor) -> bool:
    return q.is_cuda and q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device)[0] >= 8


# Of answers that are being written, into a cache of keys and values
