"""Keys and values of the answers so far, at fixed addresses."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Cache(NamedTuple):
    """Keys and values of every layer, (B, heads of k, capacity, head size) each; capacity is in tokens."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def make_causal_mask(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Return what is added to the scores of tokens at `positions`, (B, n), for keys at positions 0 to length - 1.

    Returns:
        (B, 1, n, length) in fp32: 0 for keys at a token's own and earlier positions, minus infinity for later ones.
    """
    index = torch.arange(length, device=positions.device)
    return torch.where(index <= positions[:, None, :, None], 0.0, -torch.inf)


def store(cache: torch.Tensor, new: torch.Tensor, positions: torch.Tensor, start: int | None) -> torch.Tensor:
    """Write new keys or values, (B, heads, n, size), into a cache, and return the part of the cache to attend to.

    Args:
        positions: (B, n), of the new ones; each row has its own.
        start: the first position, if it is the same in all rows: the part then ends with the new ones.
    """
    if start is not None:
        cache[:, :, start : start + new.shape[2]] = new
        return cache[:, :, : start + new.shape[2]]
    cache.scatter_(2, positions[:, None, :, None].expand_as(new), new)
    return cache


def attend_cached(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the attention's output, (B · n, heads · size), of q, (B, heads, n, size).

    For one token a row, heads that share keys and values read them once.
    """
    batch, heads, length, size = q.shape
    if length > 1:
        queries_per_key = heads // keys.shape[1]
        keys, values = keys.repeat_interleave(queries_per_key, 1), values.repeat_interleave(queries_per_key, 1)
        attended = F.scaled_dot_product_attention(q, keys, values, mask.to(q.dtype))
    else:
        grouped = q.view(batch, keys.shape[1], -1, size)  # heads that share keys, as rows
        scores = (grouped @ keys.transpose(2, 3)).float() / math.sqrt(size) + mask
        attended = (scores.softmax(-1).to(q.dtype) @ values).view(batch, heads, length, size)
    return attended.transpose(1, 2).reshape(batch * length, heads * size)
