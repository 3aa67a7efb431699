"""Cross-entropy over a frozen output head, one piece of the vocabulary at a time: the full logits never exist.

At Qwen2.5-3B's vocabulary the library's loss holds 14 bytes for each of 151,936 logits a token: 1.01 GiB for 512 tokens. Here
each piece of the head is read once. Its logits update a running maximum and sum (online softmax, arXiv 1805.02867); the gradient
of the hidden states, (N, hidden), is accumulated alongside and rescaled when the maximum rises.

Covers models whose logits are the head's product with the decoder's last hidden state and nothing else: LLAMA_LIKE.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from qlora_kit.model.records import layer_masks, longest_short_text, positions
from qlora_kit.planning.shape import LLAMA_LIKE, vocabulary_piece

IGNORED = -100


class HeadRows(Protocol):
    """A head (V, H) that yields its rows in pieces, such as ShardedRows in fast/sharding.py."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[torch.Tensor]: ...


def accumulate_piece(
    hidden: torch.Tensor,
    piece: torch.Tensor,
    local: torch.Tensor | None,
    highest: torch.Tensor,
    total: torch.Tensor,
    right: torch.Tensor,
    mean: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Add one piece (rows, hidden) of the head to the running sums.

    Args:
        local: (N, 1), the target's row within this piece, or a number outside it; None if `right` is complete.
        highest, total: (N, 1), the largest logit so far and the sum of exp(logit - highest).
        right: (N, hidden), the target's row of the head, once its piece was added.
        mean: (N, hidden), the sum of exp(logit - highest) · (the logit's row of the head); None without a gradient.

    Returns:
        The new highest, total, right and mean.
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
    head: torch.Tensor | HeadRows,
    targets: torch.Tensor,
    want_gradient: bool,
    rows: int | None = None,
    scale: torch.Tensor | float = 1.0,
    accumulate: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]] = accumulate_piece,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return losses[n] = logsumexp(hidden[n] Wᵀ) - (hidden[n] Wᵀ)[target[n]] in nats, and their gradient for hidden[n].

    Args:
        hidden: (N, H), after the last norm.
        head: W, (V, H), frozen; pieces of a tensor in pinned host memory are copied to the GPU.
        targets: (N,); -100 has no loss and no gradient.
        rows: rows of the head in one piece; None chooses by vocabulary_piece.
        scale: factor of the gradient, applied before it is rounded.
        accumulate: accumulate_piece, compiled or not.

    Returns:
        (N,) in fp32, and scale · (Σ softmax · W - W[target]), (N, H) in hidden's dtype, or None.
    """
    rows = rows or vocabulary_piece(len(hidden), len(head))
    counted = (targets != IGNORED)[:, None]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    highest = torch.full((len(hidden), 1), -torch.inf, dtype=dtype, device=hidden.device)
    total = torch.zeros_like(highest)
    mean = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if want_gradient else None
    pieces: Iterable[torch.Tensor] = head.split(rows) if isinstance(head, torch.Tensor) else head
    if gathers_at_once := isinstance(head, torch.Tensor) and head.device == hidden.device:
        right = head[targets.clamp(0)]
    else:
        right = torch.zeros_like(hidden)
    for start, piece in zip(range(0, len(head), rows), pieces, strict=True):
        piece = piece.to(hidden.device, non_blocking=True)
        local = None if gathers_at_once else targets[:, None] - start
        highest, total, right, mean = accumulate(hidden, piece, local, highest, total, right, mean)
    target_logit = (hidden.to(dtype) * right).sum(1).to(hidden.dtype)  # rounded like the other logits
    losses = (highest + total.log())[:, 0] - target_logit.to(dtype)
    gradient = None if mean is None else torch.where(counted, (mean / total - right) * scale, 0.0).to(hidden.dtype)
    return torch.where(counted[:, 0], losses, 0.0), gradient


class ChunkedCrossEntropy(torch.autograd.Function):
    """Make `cross_entropy` differentiable; the forward pass computes the gradient, which the upstream gradient only scales."""

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
    """Return the loss of each token in nats, differentiable; arguments as in `cross_entropy`."""
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would change the dtypes
        return ChunkedCrossEntropy.apply(hidden.to(head.dtype), head, targets, rows)


def token_losses(model: Any, ids: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
    """Return the loss of each label but the first of each row, through the library's own layers.

    Args:
        model: a causal language model, with or without PEFT.
        ids, labels: (B, T).
        starts: (B, T), the position where each token's record begins; None for one record a row.

    Returns:
        (B, T - 1), nats in fp32, on the device of the model's head or of `ids`; zero for a label of -100.
    """
    targets = labels[:, 1:]  # (B, T - 1)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if starts is not None:
        config = model.config.get_text_config()
        if longest_short_text(config, ids.shape[1]):
            return torch.stack([_losses_of_each_record(model, *row) for row in zip(ids, labels, starts, strict=True)])
        inputs |= {"position_ids": positions(starts), "attention_mask": layer_masks(config, starts, model.dtype)}
    parts = decoder_and_head(model)
    if parts is None:
        logits = model(**inputs).logits[:, :-1]  # (B, T - 1, V)
        rows = zip(logits, targets, strict=True)  # one row at a time: its fp32 copy is the largest tensor
        return torch.stack([F.cross_entropy(row.float(), target, reduction="none", ignore_index=IGNORED) for row, target in rows])
    decoder, head = parts
    device = head.weight.device  # if the model is on several GPUs, maybe another than that of the last layer or of `ids`
    hidden = decoder(**inputs).last_hidden_state[:, :-1].to(device)  # (B, T - 1, H)
    return chunked_losses(hidden.flatten(0, 1), head.weight, targets.to(device).flatten()).view_as(targets)


def _losses_of_each_record(model: Any, ids: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Return the losses of a row, (T - 1,), whose records are computed one by one: the library chooses angles by the longest."""
    lengths = torch.unique_consecutive(starts, return_counts=True)[1].tolist()
    records = zip(ids.split(lengths), labels.split(lengths), strict=True)
    losses = [token_losses(model, own[None], label[None])[0] if len(own) > 1 else None for own, label in records]
    none = next(own for own in losses if own is not None).new_zeros(1)  # for the first token of the record that follows
    return torch.cat([none if own is None else F.pad(own, (0, 1)) for own in losses])[:-1]


def next_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return the label that each position predicts, (B · T,); -100 for the last position of a row."""
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    return targets.flatten()


def decoder_and_head(model: Any) -> tuple[Any, torch.nn.Linear] | None:
    """Return the decoder and the head of a LLAMA_LIKE model; None for other models, and if the head is trained or has a bias."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(getattr(base, "config", None), "model_type", None) not in LLAMA_LIKE:
        return None
    head = base.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None or head.weight.requires_grad:
        return None
    return base.get_decoder(), head
