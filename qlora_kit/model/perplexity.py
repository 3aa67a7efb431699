"""Perplexity, the exponential of the token-weighted mean loss, and its standard error.

Figures can only be compared with their definition, so block length and join rule are printed with each.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch

from qlora_kit.model.loss import IGNORED, token_losses


class TokenBlocks(Protocol):
    """Items with input_ids, labels and, if a block holds several records, starts, (T,) each."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


LossesOf = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]  # ids, labels, starts -> losses


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was computed from.

    Attributes:
        loss: nats per token.
        standard_error: of the perplexity; NaN for a single block.
        tokens: predicted tokens.
    """

    loss: float
    perplexity: float
    standard_error: float
    tokens: int
    blocks: int

    def __str__(self) -> str:
        return plus_minus(self.perplexity, self.standard_error, ".3f")

    def as_json(self) -> dict[str, Any]:
        """Return the fields; null for the standard error of a single block, which does not exist."""
        return asdict(self) | {"standard_error": _or_none(self.standard_error)}

    def definition(self, block_length: int, join_rule: str) -> str:
        """Return what the figure means, so that it can be compared with others."""
        blocks = "1 block" if self.blocks == 1 else f"{self.blocks} blocks"
        error = "one block has no standard error" if self.blocks == 1 else "± one standard error over blocks"
        return (
            f"exp of the mean loss over {self.tokens:,} predicted tokens, {blocks} of {block_length} tokens "
            f"without overlap ({join_rule}); {error}"
        )


def plus_minus(value: float, error: float, form: str) -> str:
    """Return a value with its standard error; without if that is NaN, as for a single block."""
    return f"{value:{form}}" if math.isnan(error) else f"{value:{form}} ± {error:{form.lstrip('+')}}"


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


class Difference(NamedTuple):
    """Difference of two mean losses on the same blocks, in nats per token."""

    loss: float
    standard_error: float

    def as_json(self) -> dict[str, Any]:
        """Return the fields; null for the standard error of a single block, which does not exist."""
        return {"loss": self.loss, "standard_error": _or_none(self.standard_error)}


def from_block_losses(sums: Sequence[float], counts: Sequence[int]) -> Perplexity:
    """Return the perplexity from each block's summed loss and its number of predicted tokens.

    loss = Σ sums / Σ counts, the token-weighted mean. Tokens of one block depend on each other, so the error is that of a
    ratio of block totals (Cochran, Sampling Techniques, section 2.11): residuals e_i = sums_i - loss · counts_i,
    SE(loss) = sqrt(n/(n-1) Σ e_i²) / Σ counts, and SE(perplexity) = perplexity · SE(loss) by the delta method.
    """
    loss, error = _ratio(sums, counts)
    perplexity = math.exp(min(loss, 700.0))  # exp overflows a float beyond 709
    return Perplexity(loss, perplexity, perplexity * error, sum(counts), len(counts))


def loss_difference(before: Sequence[float], after: Sequence[float], counts: Sequence[int]) -> Difference:
    """Return the change of the mean loss from one model to another on the same blocks.

    A block that is hard for one model is hard for the other, so the error is that of the blocks' own differences: as in
    from_block_losses, with d_i = after_i - before_i for sums_i. difference = Σ d / Σ counts,
    e_i = d_i - difference · counts_i, SE(difference) = sqrt(n/(n-1) Σ e_i²) / Σ counts.
    """
    return Difference(*_ratio([b - a for a, b in zip(before, after, strict=True)], counts))


def _ratio(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Return Σ sums / Σ counts and its standard error, NaN for one block."""
    total, blocks = sum(counts), len(counts)
    ratio = math.fsum(sums) / total
    squares = math.fsum((s - ratio * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return ratio, math.sqrt(squares * blocks / (blocks - 1)) / total if blocks > 1 else math.nan


def measure_block_losses(
    losses_of: LossesOf,
    blocks: TokenBlocks,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> tuple[list[float], list[int]]:
    """Return each block's summed loss in nats, without its first token, and its number of predicted tokens.

    Args:
        losses_of: ids, labels, starts (B, T) on the CPU -> losses (B, T - 1) in nats, without dropout, zero for a label of -100.
        batch_size: sequences per forward pass; no more than in training, so that evaluation fits into memory.
        on_batch: called with the number of blocks measured so far.
    """
    sums: list[torch.Tensor] = []
    counts: list[int] = []
    for start in range(0, len(blocks), batch_size):
        rows = [blocks[index] for index in range(start, min(start + batch_size, len(blocks)))]
        ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))  # (B, T)
        starts = torch.stack([row["starts"] for row in rows]) if "starts" in rows[0] else None
        sums.append(losses_of(ids, labels, starts).double().sum(1))
        counts += (labels[:, 1:] != IGNORED).sum(1).tolist()
        on_batch(len(counts))
    return torch.cat(sums).tolist(), counts


def library_losses(model: torch.nn.Module, autocast: AbstractContextManager | None = None) -> LossesOf:
    """Return a `losses_of` that runs the library's own layers."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def losses(ids: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
        if was_training := model.training:  # visiting all modules takes longer than a small batch
            model.eval()
        try:
            with autocast or nullcontext():
                return token_losses(model, ids.to(device), labels.to(device), None if starts is None else starts.to(device))
        finally:
            if was_training:
                model.train()

    return losses


def as_metrics(result: Perplexity) -> dict[str, float]:
    """Return an evaluation with its keys in metrics.jsonl and in the Trainer."""
    return {"eval_loss": result.loss, "eval_perplexity": result.perplexity, "eval_standard_error": result.standard_error,
            "eval_tokens": result.tokens, "eval_blocks": result.blocks}  # fmt: skip


def recorded_base(metrics: list[dict[str, Any]]) -> Perplexity | None:
    """Return the base model's perplexity that an interrupted run wrote to metrics.jsonl, or None."""
    entry = next((entry for entry in metrics if entry["step"] == 0 and "eval_loss" in entry), None)
    if entry is None:
        return None
    loss, perplexity, error, tokens, blocks = (
        entry[f"eval_{name}"] for name in ("loss", "perplexity", "standard_error", "tokens", "blocks")
    )
    return Perplexity(loss, perplexity, math.nan if error is None else error, tokens, blocks)
