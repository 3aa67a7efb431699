"""Causal attention of grouped heads by torch's own kernels, with autograd's record of this one step of a layer."""

import torch
import torch.nn.functional as F

from qlora_kit.fast.layer import Heads


def attend(heads: Heads, differentiable: bool) -> torch.Tensor:
    """Causal attention, (batch, heads, length, size); `differentiable` leaves autograd's record from q, k, v to the result."""
    q, k, v = heads
    with torch.set_grad_enabled(differentiable):
        for part in heads:
            part.requires_grad_(differentiable)
        shared = q.shape[1] // k.shape[1]  # heads of q that look at the same k and v
        if shared > 1 and not _has_flash(q):  # without flash attention, torch serves them with (length, length) tensors only
            k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
            shared = 1
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared > 1)


def _has_flash(q: torch.Tensor) -> bool:
    return q.is_cuda and q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device)[0] >= 8
