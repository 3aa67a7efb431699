"""Causal attention within the records of a packed block, by torch's own kernels.

`starts`, (B, T), describes a packed block: for each position, the index at which its record begins. Position i attends to
positions starts[i] to i and is counted from starts[i], with the angles that a text of its record's length has, so a record is
computed as if it were alone.

Flash attention takes the offsets of the records and computes what lies within them only. Elsewhere (a CPU, float32, GPUs older
than Ampere) a dense mask rules out the rest, at the cost of the whole block.
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
    mask: torch.Tensor | None = None  # (B, 1, T, T), added to the scores
    offsets: torch.Tensor | None = None  # (B · most records + 1,), as find_offsets returns them; without both: one text a block


def lay_out_blocks(batch: int, tables: RotaryTables, starts: torch.Tensor | None, most_records: int) -> BlockLayout:
    """Return the layout of blocks that are one text each (`starts` is None) or hold at most so many records, if that is known."""
    if starts is None:
        return BlockLayout(batch, tables.whole)
    at = positions(starts)
    rotary = [table[at] for table in tables.whole]
    if tables.short:
        is_short = (record_lengths(starts) <= len(tables.short.cos))[..., None]
        own = [table[at.clamp(max=len(table) - 1)] for table in tables.short]
        rotary = [torch.where(is_short, a, b) for a, b in zip(own, rotary, strict=True)]
    layout = BlockLayout(batch, Rotary(*(table[:, None] for table in rotary)))
    if most_records and _has_flash(tables.whole.cos):
        return layout._replace(offsets=find_offsets(starts, most_records))
    return layout._replace(mask=record_mask(starts, tables.whole.cos.dtype))


def find_offsets(starts: torch.Tensor, most_records: int) -> torch.Tensor:
    """Return where each record begins among the N = B · T tokens of all blocks, then N: (B · most_records + 1,), int32.

    The result has one shape for all blocks, as a CUDA graph needs it: places beyond the last record hold N.

    Args:
        most_records: at least the number of records of each block; its padding counts as one.
    """
    begins = (positions(starts) == 0).flatten()
    offsets = starts.new_full((len(starts) * most_records + 1,), begins.numel(), dtype=torch.int32)
    tokens = torch.arange(begins.numel(), dtype=torch.int32, device=starts.device)
    return offsets.scatter_reduce_(0, begins.cumsum(0) - 1, tokens, "amin")


def attend(heads: Heads, layout: BlockLayout, differentiable: bool) -> torch.Tensor:
    """Return the attention's output, (batch, heads, length, size).

    Args:
        differentiable: whether autograd records the attention, so that the output leads back to q, k and v.
    """
    q, k, v = heads
    with torch.set_grad_enabled(differentiable):
        for tensor in heads:
            tensor.requires_grad_(differentiable)
        if layout.offsets is not None:
            return _attend_within(layout.offsets, heads)
        queries_per_key = q.shape[1] // k.shape[1]
        # Without flash attention, which takes no mask, torch computes grouped heads with (length, length) tensors only.
        if queries_per_key > 1 and (layout.mask is not None or not _has_flash(q)):
            k, v = k.repeat_interleave(queries_per_key, 1), v.repeat_interleave(queries_per_key, 1)
            queries_per_key = 1
        return F.scaled_dot_product_attention(q, k, v, layout.mask, is_causal=layout.mask is None, enable_gqa=queries_per_key > 1)


def _attend_within(offsets: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Attend within records. torch has no public name for this that releases 2.8 and 2.9 know: varlen_attn calls the same."""
    batch, _, length, _ = heads[0].shape
    rows = [tensor.transpose(1, 2).flatten(0, 1) for tensor in heads]  # (N, heads, size), without a copy
    attended = torch.ops.aten._flash_attention_forward(*rows, offsets, offsets, length, length, 0.0, True, False)[0]
    return attended.unflatten(0, (batch, length)).transpose(1, 2)


def _has_flash(x: torch.Tensor) -> bool:
    """Return whether torch has flash attention for heads of the dtype and size of x, (..., size), on its device."""
    fits = x.dtype != torch.float32 and x.shape[-1] % 8 == 0 and x.shape[-1] <= 256
    return fits and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 8
