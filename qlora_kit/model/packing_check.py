"""Find out whether a loaded model computes records that share a block as it computes each alone.

Masks and positions keep records apart in attention (records.py). What else mixes tokens takes no mask: a recurrent or
convolutional layer carries its state into the next record, and ALiBi counts distances from the beginning of the block. Instead of
a list of such models, two records are computed both ways.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch

from qlora_kit.model.device import is_out_of_memory
from qlora_kit.model.loss import IGNORED
from qlora_kit.model.perplexity import LossesOf, library_losses
from qlora_kit.model.records import attention_reach, longest_short_text

TOLERANCE = 1e-3  # nats of the worst token, in float32
NOISE = 10  # in 16 bits: times what the losses of one record differ between two lengths of padding
ROUNDING = 0.05  # in 16 bits: nats that two kernels may differ by where both paddings happen to take the same one


class Records(Protocol):
    """Blocks of records: data/blocks.py."""

    @property
    def packed(self) -> bool: ...

    @property
    def length(self) -> int: ...

    def sample(self) -> np.ndarray: ...

    def unpack(self) -> Self: ...

    def mark(self) -> Self: ...


Blocks = TypeVar("Blocks", bound=Records)


def lay_out_exactly(model: Any, blocks: Blocks, run: Mapping[str, Any]) -> tuple[Blocks, str | None]:
    """Return blocks in which the library's layers compute each record as if alone, and why they are unpacked, if a trial says so.

    Args:
        run: run.json of the adapter, whose decision holds; without one, the model is tried.
    """
    was_packed = _read_decision(run)
    reason = why_not_packed(model, blocks.sample()) if blocks.packed and was_packed is None else None
    if reason or was_packed is False:
        blocks = blocks.unpack()
    return (blocks.mark() if needs_marks(model, blocks.length) else blocks), reason


def _read_decision(run: Mapping[str, Any]) -> bool | None:
    data = run.get("data")
    packed = data.get("packed") if isinstance(data, dict) else None
    return packed if isinstance(packed, bool) else None


def needs_marks(model: Any, length: int) -> bool:
    """Return whether the length of a record decides how it is computed, so that its end has to be known."""
    return longest_short_text(model.config.get_text_config(), length) is not None


def why_not_packed(model: Any, tokens: np.ndarray, losses_of: LossesOf | None = None) -> str | None:
    """Return why records cannot share a block of the model, or None if each has the losses there that it has alone.

    Two records are tried, the longer one longer than any attention window that a block exceeds, without adapter and dropout.
    Nothing random is drawn, and the model is left as it was.

    Args:
        tokens: ids of a block, (T,) int64.
        losses_of: as the run computes losses; through the library's own layers by default.
    """
    losses_of = losses_of or library_losses(model)
    ids = torch.from_numpy(tokens)[None]
    border, end = choose_border(model, len(tokens)), len(tokens)
    starts = torch.zeros_like(ids)
    starts[:, border:] = border
    name = f"the library's {model.config.model_type}"
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        alone = torch.cat([_losses(losses_of, ids[:, :border]), _losses(losses_of, ids[:, border:])], 1)
        try:
            together = _losses(losses_of, ids, starts)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            words = " ".join(str(error).split())[:100]
            return f"{name} cannot compute several records in a block ({type(error).__name__}: {words})"
        limit = TOLERANCE
        if model.dtype != torch.float32:
            padded = torch.cat([ids[:, border:], ids[:, :border]], 1)
            noise = _worst(_losses(losses_of, padded)[:, : end - border - 1], alone[:, border - 1 :])
            limit = max(ROUNDING, NOISE * noise)
    worst = _worst(torch.cat([together[:, : border - 1], together[:, border:]], 1), alone)
    if worst <= limit or not alone.isfinite().all():
        return None
    return f"{name} computes a record otherwise beside another one in its block: the loss of a token differs by {worst:.2g} nats"


def choose_border(model: Any, length: int) -> int:
    """Return where the second record of a trial begins: behind one eighth of the block, or less for an attention window."""
    longest = max(filter(None, attention_reach(model.config.get_text_config(), length)), default=0)
    return max(2, min(length // 8, length - longest - 1))


def _losses(losses_of: LossesOf, ids: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
    labels = ids.clone() if starts is None else ids.masked_fill(starts == torch.arange(ids.shape[1]), IGNORED)
    return losses_of(ids, labels, starts).float().cpu()


def _worst(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first - second).abs().max().item()
