"""Does the merged model predict as base + adapter does? Perplexity of both on the same blocks, one model loaded at a time.

Where both have the same weights up to rounding, their mean losses must agree. On the original base the error of quantization is
gone, which changes the loss: there the merged model must only not be worse by more than a margin.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from qlora_kit.adapter.folder import AdapterSource
from qlora_kit.config import Config, DataSettings
from qlora_kit.data.blocks import Blocks, RecordBlocks
from qlora_kit.data.dataset import load_blocks
from qlora_kit.data.source import check_source, is_file_name
from qlora_kit.errors import UserError
from qlora_kit.merge.weights import Packing
from qlora_kit.model.load import DeviceMap, load_base_model, quantization_config
from qlora_kit.model.perplexity import (
    Perplexity,
    from_block_losses,
    library_losses,
    loss_difference,
    measure_perplexity,
    plus_minus,
)

ARTICLES = Path(__file__).resolve().parents[2] / "samples" / "articles.txt"
BLOCKS, LENGTH = 16, 512  # at most: 8,192 tokens
ROUNDING, MARGIN = 0.01, 0.05  # nats a token
ERRORS = 2.0  # standard errors of the difference that may be chance


@dataclass(frozen=True)
class Measured:
    """A model's loss on each block: sums in nats, and how many tokens they are of."""

    sums: list[float]
    counts: list[int]

    @property
    def perplexity(self) -> Perplexity:
        return from_block_losses(self.sums, self.counts)


@dataclass(frozen=True)
class Comparison:
    """merged less adapter, in nats a token, with the standard error of the paired difference."""

    adapter: Perplexity
    merged: Perplexity
    difference: float
    standard_error: float  # nan for a single block
    same_weights: bool  # up to rounding

    @property
    def passed(self) -> bool:
        allowed = ROUNDING if self.same_weights else MARGIN
        beyond = abs(self.difference) if self.same_weights else self.difference
        chance = 0.0 if math.isnan(self.standard_error) else ERRORS * self.standard_error
        return beyond <= max(allowed, chance)  # False for a loss that is no number

    @property
    def rule(self) -> str:
        kind, allowed = ("differ", ROUNDING) if self.same_weights else ("be worse", MARGIN)
        return f"may {kind} by {allowed} nats or {ERRORS:g} standard errors, whichever is more"

    def lines(self) -> list[str]:
        return [
            f"  base + adapter   {self.adapter}",
            f"  merged           {self.merged}",
            f"  difference       {plus_minus(self.difference, self.standard_error, '+.4f')} nats a token",
            f"  {'pass' if self.passed else 'FAIL'}             {self.rule}",
        ]


def compare(adapter: Measured, merged: Measured, same_weights: bool) -> Comparison:
    """The same blocks in the same order; their differences have a far smaller error than either mean."""
    difference = loss_difference(adapter.sums, merged.sums, adapter.counts)
    return Comparison(adapter.perplexity, merged.perplexity, *difference, same_weights)


# On what


def check_blocks(
    source: AdapterSource, name: str | None, tokenizer: Any, positions: int | None
) -> tuple[Blocks | RecordBlocks, str]:
    """Blocks to check on, and what they are.

    Args:
        name: a file; None takes the run's own evaluation data where that is local, else the articles that come with the code.
        positions: tokens that the model reads at most.

    Raises:
        UserError: it cannot be read, or fills no block.
    """
    own = source.config.data
    if name is None and source.complete and _is_here(own):
        blocks = load_blocks(source.config, tokenizer)[1]
        assert blocks is not None  # with an eval_split
        length, what = own.max_length, "the run's evaluation data"
    else:
        length, what = min(own.max_length, LENGTH, positions or LENGTH), name or str(ARTICLES)
        changes = {"dataset": what, "subset": None, "format": "auto", "eval_split": None, "max_train_samples": None}
        data = own.model_copy(update=changes | {"max_length": length})
        try:
            check_source(data)
            blocks = load_blocks(Config(data=data), tokenizer)[0]
        except UserError as error:
            raise error.under("--check", what, remedy="use another file, or --check none") from None
    blocks = blocks.take(BLOCKS)
    return blocks, f"{len(blocks)} block{'s' if len(blocks) > 1 else ''} of {length} tokens, {what}"


def _is_here(data: DataSettings) -> bool:
    """Whether a run's evaluation data are local and still there."""
    if data.eval_split is None:
        return False
    names = [*data.names, *([data.eval_split] if isinstance(data.eval_split, str) and is_file_name(data.eval_split) else [])]
    return all(Path(name).expanduser().exists() for name in names)


# Models


def measure_adapter(source: AdapterSource, base: str, packing: Packing, device_map: DeviceMap, blocks: Any) -> Measured:
    """Of base + adapter, loaded as for training."""
    model = load_base_model(
        base,
        quantization_config(packing.settings, packing.dtype),
        device=device_map,
        dtype=packing.dtype,
        revision=source.model.revision,
        trust_remote_code=source.model.trust_remote_code,
    )
    return _measure(PeftModel.from_pretrained(model, source.folder, torch_device=packing.device), blocks)


def measure_merged(folder: Path, packing: Packing, device_map: DeviceMap, trust_remote_code: bool, blocks: Any) -> Measured:
    """Of the merged model, loaded without peft and without quantization."""
    model = load_base_model(folder, None, device=device_map, dtype=packing.dtype, trust_remote_code=trust_remote_code)
    return _measure(model, blocks)


def _measure(model: Any, blocks: Any) -> Measured:
    losses_of = library_losses(model)
    each = [measure_perplexity(losses_of, [blocks[index]], batch_size=1) for index in range(len(blocks))]
    return Measured([one.loss * one.tokens for one in each], [one.tokens for one in each])
