"""Keys and values of the answers so far."""

import math

import torch
import torch.nn.functional as F


def visible_to(at: torch.Tensor, room: int) -> torch.Tensor:
    """(B, 1, n, room): 0 where a token may look, else minus infinity, in fp32."""
    index = torch.arange(room, device=at.device)
    return torch.where(index <= at[:, None, :, None], 0.0, -torch.inf)


def store(cache: torch.Tensor, new: torch.Tensor, at: torch.Tensor, start: int | None) -> torch.Tensor:
    """Put new (B, heads, n, size) at its positions; returns what there is to look at."""
    if start is not None:
        cache[:, :, start : start + new.shape[2]] = new
        return cache[:, :, : start + new.shape[2]]
    cache.scatter_(2, at[:, None, :, None].expand_as(new), new)
    return cache


def attend_cached(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """(B · n, heads · size) of q (B, heads, n, size); heads that share keys and values read them once."""
    batch, heads, length, size = q.shape
    if length > 1:
        shared = heads // keys.shape[1]
        keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
        attended = F.scaled_dot_product_attention(q, keys, values, visible.to(q.dtype))
    else:
        grouped = q.view(batch, keys.shape[1], -1, size)  # heads that share, as rows
        scores = (grouped @ keys.transpose(2, 3)).float() / math.sqrt(size) + visible
        attended = (scores.softmax(-1).to(q.dtype) @ values).view(batch, heads, length, size)
    return attended.transpose(1, 2).reshape(batch * length, heads * size)
