"""Records that share a block: each token's position in its record, and the attention masks that keep records apart.

`starts`, (B, T), describes blocks: for each position, the index at which its record begins. A record attends to itself only, in
windowed and chunked layers as far back as it would alone.
"""

from typing import Any

import torch

WINDOWED, CHUNKED, FULL = "sliding_attention", "chunked_attention", "full_attention"  # the library's names of layer types


def positions(starts: torch.Tensor) -> torch.Tensor:
    """Return each token's position in its own record, (B, T)."""
    return torch.arange(starts.shape[1], device=starts.device) - starts


def record_lengths(starts: torch.Tensor) -> torch.Tensor:
    """Return the number of tokens of each token's record, (B, T)."""
    return (starts[:, :, None] == starts[:, None]).sum(-1)


def record_mask(starts: torch.Tensor, dtype: torch.dtype, window: int | None = None, chunk: int | None = None) -> torch.Tensor:
    """Return the attention mask (B, 1, T, T): 0 if token i attends to token j, else minus infinity.

    Args:
        window: a token attends to itself and the `window - 1` tokens before it.
        chunk: a token attends to its own chunk of so many tokens, counted from the beginning of its record.
    """
    index = torch.arange(starts.shape[1], device=starts.device)
    visible = (index <= index[:, None]) & (index >= starts[:, :, None])
    if window:
        visible &= index > index[:, None] - window
    if chunk:
        chunks = positions(starts) // chunk
        visible &= chunks[:, None] == chunks[:, :, None]
    return torch.where(visible, 0.0, -torch.inf).to(dtype)[:, None]


def layer_masks(config: Any, starts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return the mask of all layers, or if they need several, one for each layer type, as the library's decoders take them.

    Args:
        config: of the model, or of its text part.
    """
    window, chunk = attention_reach(config, starts.shape[1])
    types = set(getattr(config, "layer_types", None) or [WINDOWED if window else CHUNKED if chunk else FULL])
    limits = {kind: (window if kind == WINDOWED else None, chunk if kind == CHUNKED else None) for kind in types}
    masks = {limit: record_mask(starts, dtype, *limit) for limit in set(limits.values())}
    return {kind: masks[limit] for kind, limit in limits.items()} if len(masks) > 1 else next(iter(masks.values()))


def attention_reach(config: Any, length: int) -> tuple[int | None, int | None]:
    """Return the window and the chunk length of a model's attention in tokens; None for what no text of `length` exceeds."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    chunk = getattr(config, "attention_chunk_size", None)
    window, chunk = (reach if isinstance(reach, int) and 0 < reach < length else None for reach in (window, chunk))
    return window, chunk


def longest_short_text(config: Any, length: int) -> int | None:
    """Return the most tokens of a text that has rotary angles of its own (longrope), if texts of `length` have others."""
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):  # one for all layers, or one for each layer type
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            limit = part.get("original_max_position_embeddings")
            return limit if limit and limit < length else None
    return None
