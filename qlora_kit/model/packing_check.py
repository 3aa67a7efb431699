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

TOLERANCE = 1e-3  # nats of the worst token
NOISE = 10  # in 16 bits: times what the losses of one record differ between two lengths of padding
# In 16 bits: nats that rounding may make where a record begins elsewhere in a tile of a kernel, even if padding makes none. Exact
# models with random weights came to 0.6 in bfloat16 (H100, 2026-11-27).
ROUNDING = 1.0


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

    Two records are tried, the first longer than any attention window that a block exceeds, without adapter and dropout. Nothing
    random is drawn, and the model is left as it was.

    Args:
        tokens: ids of a block, (T,) int64.
        losses_of: as the run computes losses; through the library's own layers by default.
    """
    losses_of, ids = losses_of or library_losses(model), torch.from_numpy(tokens)[None]
    border = choose_border(model, len(tokens))
    starts = torch.where(torch.arange(len(tokens)) < border, 0, border)[None]
    name = f"the library's {model.config.model_type}"
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        alone = [_losses(losses_of, record) for record in (ids[:, :border], ids[:, border:])]
        try:
            together = _split(_losses(losses_of, ids, starts), border)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            words = " ".join(str(error).split())[:100]
            return f"{name} cannot compute several records in a block ({type(error).__name__}: {words})"
        worst = _worst(together, alone)
        if worst > TOLERANCE and model.dtype != torch.float32:
            noise = NOISE * _worst([_losses(losses_of, ids)[:, : border - 1]], alone[:1])
            # The second record beside another one: the same kernels round the same numbers at the same places.
            other = torch.cat([ids[:, :border].flip(1), ids[:, border:]], 1)
            leak = _worst(_split(_losses(losses_of, other, starts), border)[1:], together[1:])
            worst = leak if leak > max(TOLERANCE, noise) else worst if worst > max(ROUNDING, noise) else 0.0
    if worst <= TOLERANCE or not all(losses.isfinite().all() for losses in alone):
        return None
    return f"{name} computes a record differently beside another one in its block: the loss of a token is {worst:.2g} nats off"


def choose_border(model: Any, length: int) -> int:
    """Return where the second record of a trial begins: it has one eighth of the block, or less for an attention window."""
    longest = max(filter(None, attention_reach(model.config.get_text_config(), length)), default=0)
    return length - max(2, min(length // 8, length - longest - 1))


def _losses(losses_of: LossesOf, ids: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
    labels = ids.clone() if starts is None else ids.masked_fill(starts == torch.arange(ids.shape[1]), IGNORED)
    return losses_of(ids, labels, starts).float().cpu()


def _split(losses: torch.Tensor, border: int) -> list[torch.Tensor]:
    return [losses[:, : border - 1], losses[:, border:]]


def _worst(losses: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return (torch.cat(losses, 1) - torch.cat(others, 1)).abs().max().item()
