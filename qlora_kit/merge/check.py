"""Check a merged model against base + adapter: the perplexity of both on the same blocks, one model loaded at a time.

If both have the same weights up to rounding, their mean losses must agree. Merging onto the original base removes the error of
quantization, which changes the loss: there the merged model must only not be worse by more than a margin.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.adapter.attach import attach_adapter, load_base
from qlora_kit.adapter.folder import AdapterSource
from qlora_kit.config import Config, DataSettings
from qlora_kit.data.blocks import RecordBlocks, TrainingBlocks, describe_unpacked
from qlora_kit.data.dataset import load_blocks
from qlora_kit.data.source import check_source
from qlora_kit.data.splits import is_file_name
from qlora_kit.errors import Failed, UserError
from qlora_kit.merge.weights import Packing
from qlora_kit.model.device import is_out_of_memory
from qlora_kit.model.gpu_placement import choose_device_map
from qlora_kit.model.load import DeviceMap, load_base_model
from qlora_kit.model.packing_check import lay_out_exactly
from qlora_kit.model.perplexity import (
    Difference,
    Perplexity,
    from_block_losses,
    library_losses,
    loss_difference,
    measure_block_losses,
    plus_minus,
)
from qlora_kit.shipped import HOME, locate
from qlora_kit.wrapping import say

ARTICLES = HOME / "samples" / "articles.txt"
BLOCKS, LENGTH = 16, 512  # at most: 8,192 tokens
ROUNDING, MARGIN = 0.01, 0.05  # nats per token
ERRORS = 2.0  # standard errors of the difference that may be chance


@dataclass(frozen=True)
class Comparison:
    """Perplexities of base + adapter and of the merged model on the same blocks.

    Attributes:
        difference: merged - adapter.
        same_weights: both have the same weights up to rounding.
        data: the name of the blocks.
    """

    adapter: Perplexity
    merged: Perplexity
    difference: Difference
    same_weights: bool
    data: str = ""

    @property
    def passed(self) -> bool:
        """Return whether the models differ by no more than the rule allows."""
        loss, error = self.difference
        allowed = ROUNDING if self.same_weights else MARGIN
        chance = 0.0 if math.isnan(error) else ERRORS * error
        return (abs(loss) if self.same_weights else loss) <= max(allowed, chance)  # False for NaN

    @property
    def rule(self) -> str:
        """Return the allowed difference in words."""
        kind, allowed = ("differ", ROUNDING) if self.same_weights else ("be worse", MARGIN)
        return f"may {kind} by {allowed} nats or {ERRORS:g} standard errors, whichever is more"

    def lines(self) -> list[str]:
        """Return the lines of the report."""
        return [
            f"Perplexity on {self.data}:",
            f"  base + adapter   {self.adapter}",
            f"  merged           {self.merged}",
            f"  difference       {plus_minus(*self.difference, '+.4f')} nats per token",
            f"  {'pass' if self.passed else 'FAIL'}             {self.rule}",
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the `check` of merge.json; a standard error that does not exist is null."""
        difference = self.difference.as_json()
        return {
            "adapter": self.adapter.as_json(),
            "merged": self.merged.as_json(),
            "difference": difference["loss"],
            "standard_error": difference["standard_error"],
            "same_weights": self.same_weights,
            "data": self.data,
            "rule": self.rule,
            "passed": self.passed,
        }


def compare_losses(
    adapter: Sequence[float], merged: Sequence[float], counts: Sequence[int], same_weights: bool, data: str = ""
) -> Comparison:
    """Compare two models by their summed losses on each block; a paired difference has a far smaller error than either mean.

    Args:
        adapter, merged: nats of each block.
        counts: predicted tokens of each block.
        data: the name of the blocks, behind their number.
    """
    difference = loss_difference(adapter, merged, counts)
    data = f"{len(counts)} block{'s' * (len(counts) > 1)} {data}"
    return Comparison(from_block_losses(adapter, counts), from_block_losses(merged, counts), difference, same_weights, data)


def load_check_blocks(
    source: AdapterSource, name: str | None, tokenizer: PreTrainedTokenizerBase, positions: int | None
) -> tuple[TrainingBlocks, str]:
    """Return the blocks to check on, and their name, which their number precedes.

    Args:
        name: a file; None takes the run's own evaluation data if they are local, else samples/articles.txt.
        positions: the most tokens that the model reads; None if it states no limit.

    Raises:
        UserError: the file cannot be read, or fills no block.
    """
    own = source.config.data
    if name is None and source.provenance and _is_available(own, source.folder):
        blocks = load_blocks(source.config, tokenizer)[1]
        assert blocks is not None  # with an eval_split
        length, name = own.max_length, "the run's evaluation data"
    else:
        length, name = min(own.max_length, LENGTH, positions or LENGTH), locate(name or str(ARTICLES))
        changes = {"dataset": name, "subset": None, "format": "auto", "eval_split": None, "max_train_samples": None}
        data = own.model_copy(update=changes | {"max_length": length})
        try:
            check_source(data)
            blocks = load_blocks(Config(data=data), tokenizer, "--check")[0]
        except UserError as error:
            of_file = ("data.dataset", "--check")
            problems = [replace(one, key="--check", value=name) if one.key in of_file else one for one in error.problems]
            raise _or_no_check(UserError.of(problems)) from None
    return blocks, f"of {length} tokens, {name}"


def _or_no_check(error: UserError) -> UserError:
    return UserError.of(replace(one, remedy=f"{one.remedy}, or use --check none") for one in error.problems)


def _is_available(data: DataSettings, adapter: Path) -> bool:
    """Return whether a run's evaluation data are local and still exist; a folder above the adapter's is no data of its run."""
    if data.eval_split is None:
        return False
    names = [*data.names, *([data.eval_split] if isinstance(data.eval_split, str) and is_file_name(data.eval_split) else [])]
    paths = [os.path.realpath(os.path.expanduser(name)) for name in names]
    return all(os.path.exists(path) and not adapter.resolve().is_relative_to(path) for path in paths)


def choose_device_maps(source: AdapterSource, base: Path, packing: Packing, wanted: str) -> list[DeviceMap]:
    """Return the device maps of base + adapter and of the merged model, which is not packed.

    Args:
        base: the base model's folder.
        wanted: auto or one, as in choose_device_map.

    Raises:
        UserError: the GPUs have no room for one of them.
    """
    device_maps = []
    for packed in (source.quantization.load_in_4bit, False):
        quantization = source.quantization.model_copy(update={"load_in_4bit": packed})
        try:
            device_map, note = choose_device_map(base, source.model, quantization, packing.dtype, packing.device, wanted)
        except UserError as error:
            raise _or_no_check(error) from None
        if note:
            say(note)
        device_maps.append(device_map)
    return device_maps


def compare_models(
    output: Path, source: AdapterSource, packing: Packing, device_maps: list[DeviceMap], blocks: TrainingBlocks
) -> tuple[list[float], list[float], list[int]]:
    """Return the losses of base + adapter and of the merged model on each block in nats, and its predicted tokens.

    The first BLOCKS blocks are taken, in which records share a block only where the model computes each as if alone.

    Args:
        output: the folder of the merged model.
        device_maps: those of base + adapter and of the merged model.

    Raises:
        Failed: the GPU's memory is full.
    """
    try:
        model = attach_adapter(load_base(source, packing.dtype, device_maps[0]), source, packing.device)
        if isinstance(blocks, RecordBlocks):
            blocks, reason = lay_out_exactly(model, blocks, source.provenance)
            if reason:
                say(describe_unpacked(reason))
        blocks = blocks.take(BLOCKS)
        adapter, counts = _measure(model, blocks)
        del model  # frees its memory for the merged one
        trusted = source.model.trust_remote_code
        merged = load_base_model(output, None, device=device_maps[1], dtype=packing.dtype, trust_remote_code=trusted)
        return adapter, _measure(merged, blocks)[0], counts
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        remedy = "check with --overwrite --device cpu"
        raise Failed(f"the GPU's memory is full: {output} is complete and was not checked; {remedy}") from None


def _measure(model: PreTrainedModel | PeftModel, blocks: TrainingBlocks) -> tuple[list[float], list[int]]:
    return measure_block_losses(library_losses(model), blocks, batch_size=1)
