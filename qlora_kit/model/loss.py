"""Cross-entropy over a frozen output head, a piece of the vocabulary at a time: the full logits never exist.

At Qwen2.5-3B's vocabulary the library's loss holds 14 bytes for each of 151,936 logits a token: 1.01 GiB for 512 tokens.
Here each piece of the head is read once: its logits update a running maximum and sum (online softmax, arXiv 1805.02867), and the
gradient of the hidden states, (N, hidden), is summed up alongside and scaled when the maximum rises.

Covers models whose logits are the head's product with the decoder's last hidden state and nothing else: memory.LLAMA_LIKE.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from qlora_kit.planning.shape import LLAMA_LIKE, vocabulary_piece

IGNORED = -100


def accumulate_piece(
    hidden: torch.Tensor,
    piece: torch.Tensor,
    local: torch.Tensor | None,
    highest: torch.Tensor,
    total: torch.Tensor,
    right: torch.Tensor,
    mean: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Take in one piece (rows, hidden) of the head.

    local: (N, 1), the target's row within this piece, or a number outside it; None: `right` is complete.
    highest, total: (N, 1), the largest logit so far and the sum of exp(logit - highest).
    right: (N, hidden), the target's row of the head once its piece has come.
    mean: (N, hidden), the sum of exp(logit - highest) · (the logit's row of the head); None when no gradient is wanted.
    """
    logits = (hidden @ piece.T).to(total.dtype)  # (N, rows)
    raised = torch.maximum(highest, logits.amax(1, keepdim=True))
    shrink = torch.exp(highest - raised)
    share = torch.exp(logits - raised)
    if mean is not None:
        mean = mean * shrink + (share.to(piece.dtype) @ piece).to(total.dtype)
    if local is not None:
        inside = (local >= 0) & (local < len(piece))
        right = torch.where(inside, piece[local[:, 0].clamp(0, len(piece) - 1)], right)
    return raised, total * shrink + share.sum(1, keepdim=True), right, mean


def cross_entropy(
    hidden: torch.Tensor,
    head: Any,
    targets: torch.Tensor,
    want_gradient: bool,
    rows: int | None = None,
    scale: torch.Tensor | float = 1.0,
    accumulate: Callable = accumulate_piece,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """losses[n] = logsumexp(hidden[n] Wᵀ) - (hidden[n] Wᵀ)[target[n]] in nats, and its gradient with respect to hidden[n].

    Args:
        hidden: (N, H), after the last norm.
        head: (V, H), frozen; a tensor, in pinned host memory copied over piece by piece, or ShardedRows (sharding.py).
        targets: (N,); -100 counts as no loss and no gradient.
        rows: of the head in one piece; None chooses by memory.vocabulary_piece.
        scale: of the gradient, applied before it is rounded.
        accumulate: accumulate_piece, compiled or not.

    Returns:
        (N,) in fp32, and (N, H) in hidden's dtype or None: scale · (Σ softmax · W - W[target]).
    """
    rows = rows or vocabulary_piece(len(hidden), len(head))
    whole = isinstance(head, torch.Tensor)
    counted = (targets != IGNORED)[:, None]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    highest = torch.full((len(hidden), 1), -torch.inf, dtype=dtype, device=hidden.device)
    total = torch.zeros_like(highest)
    here = whole and head.device == hidden.device
    right = head[targets.clamp(0)] if here else torch.zeros_like(hidden)
    mean = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if want_gradient else None
    for start, piece in zip(range(0, len(head), rows), head.split(rows) if whole else head, strict=True):
        piece = piece.to(hidden.device, non_blocking=True)
        local = None if here else targets[:, None] - start
        highest, total, right, mean = accumulate(hidden, piece, local, highest, total, right, mean)
    target_logit = (hidden.to(dtype) * right).sum(1).to(hidden.dtype)  # rounded as the other logits were
    losses = (highest + total.log())[:, 0] - target_logit.to(dtype)
    gradient = None if mean is None else torch.where(counted, (mean / total - right) * scale, 0.0).to(hidden.dtype)
    return torch.where(counted[:, 0], losses, 0.0), gradient


class ChunkedCrossEntropy(torch.autograd.Function):
    """`cross_entropy` for autograd: the gradient is the same whatever is done with the losses later, so it is taken at once."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, rows: int | None) -> torch.Tensor:
        losses, gradient = cross_entropy(hidden, head, targets, ctx.needs_input_grad[0], rows)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0][:, None]).to(gradient.dtype), None, None, None


def chunked_losses(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, rows: int | None = None) -> torch.Tensor:
    """Loss of each token in nats, differentiable; arguments as in `cross_entropy`."""
    with torch.autocast(hidden.device.type, enabled=False):  # the dtypes are chosen here
        return ChunkedCrossEntropy.apply(hidden.to(head.dtype), head, targets, rows)


def token_losses(model: Any, ids: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
    """Loss of each label but the first of each row, predicted from what stands before it, through the library's own layers.

    Args:
        model: a causal language model, with or without PEFT around it.
        ids, labels: (B, T).
        starts: (B, T), where each token's record begins (attention.py); None: one record a row.

    Returns:
        (B, T - 1), nats in fp32, on the device of the model's head or of `ids`; zero where the label is -100.
    """
    targets = labels[:, 1:]  # (B, T - 1)
    inputs = {"input_ids": ids, "use_cache": False}
    if starts is not None:
        inputs |= {"position_ids": positions(starts), "attention_mask": record_mask(starts, model.dtype)}
    parts = decoder_and_head(model)
    if parts is None:
        logits = model(**inputs).logits[:, :-1]  # (B, T - 1, V)
        rows = zip(logits, targets, strict=True)  # a row at a time: its fp32 copy is the largest tensor
        return torch.stack([F.cross_entropy(row.float(), target, reduction="none", ignore_index=IGNORED) for row, target in rows])
    decoder, head = parts
    place = head.weight.device  # of a model spread over several GPUs neither that of its last layer nor that of `ids`
    hidden = decoder(**inputs).last_hidden_state[:, :-1].to(place)  # (B, T - 1, H)
    return chunked_losses(hidden.flatten(0, 1), head.weight, targets.to(place).flatten()).view_as(targets)


def next_labels(labels: torch.Tensor) -> torch.Tensor:
    """(B · T,): the next label of each position, none for the last of a row."""
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    return targets.flatten()


def decoder_and_head(model: Any) -> tuple[Any, torch.nn.Linear] | None:
    """The two parts between which the loss is taken, or None when the model does more between them, or its head is trained."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(getattr(base, "config", None), "model_type", None) not in LLAMA_LIKE:
        return None
    head = base.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None or head.weight.requires_grad:
        return None
    return base.get_decoder(), head


def positions(starts: torch.Tensor) -> torch.Tensor:
    """Each token's place in its own record, (B, T)."""
    return torch.arange(starts.shape[1], device=starts.device) - starts


def record_mask(starts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, T, T): 0 where row i may look at column j, else minus infinity."""
    index = torch.arange(starts.shape[1], device=starts.device)
    visible = (index <= index[:, None]) & (index >= starts[:, :, None])
    return torch.where(visible, 0.0, -torch.inf).to(dtype)[:, None]
