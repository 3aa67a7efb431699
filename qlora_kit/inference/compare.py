"""--perplexity: base and adapter on the same blocks."""

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.adapter.folder import AdapterSource
from qlora_kit.config import Config
from qlora_kit.data.blocks import RecordBlocks, TrainingBlocks, describe_unpacked
from qlora_kit.data.dataset import load_blocks, source_blocks
from qlora_kit.data.source import TABLE_SUFFIXES, open_source
from qlora_kit.errors import UserError
from qlora_kit.inference.generator import Generator
from qlora_kit.model.hub import is_local
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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Comparison:
    """Perplexities of base model and adapter on the same blocks.

    Attributes:
        data: the name of the blocks.
        adapter, difference: None where the base model alone was measured.
        definition: what the figures mean: tokens, block length, overlap.
    """

    data: str
    base: Perplexity
    adapter: Perplexity | None
    difference: Difference | None
    definition: str

    def as_object(self) -> dict[str, Any]:
        """Return the object of a line of --json; a standard error that does not exist is null."""
        measured = {"base": self.base, "adapter": self.adapter, "difference": self.difference}
        fields = {name: result.as_json() for name, result in measured.items() if result is not None}
        return {"perplexity": {"data": self.data, **fields, "definition": self.definition}}

    def lines(self) -> list[str]:
        """Return the lines of the report."""
        found = [f"perplexity on {self.data}", f"  base        {self.base}"]
        if self.adapter and self.difference:
            figure, what = plus_minus(*self.difference, "+.4f"), "adapter - base, standard error of the blocks' own differences"
            verdict = f"  difference  {figure} nats per token ({what}): {judge_difference(self.difference)}"
            found += [f"  adapter     {self.adapter}", verdict]
        return [*found, f"  {self.definition}"]


def judge_difference(difference: Difference) -> str:
    """Return a verdict; two standard errors are about 95 % of a normal distribution."""
    loss, error = difference
    if loss == 0:
        return "the adapter does nothing here"
    if math.isnan(error):
        return "one block says nothing about the error; use more text"
    if abs(loss) < 2 * error:
        return "no difference that this text can show"
    return "the adapter is better" if loss < 0 else "the adapter is worse"


def evaluation_blocks(name: str, config: Config, tokenizer: "PreTrainedTokenizerBase") -> tuple[TrainingBlocks, str]:
    """Return the blocks to measure on, and their name.

    The data set of training gives the blocks that the run held out. Any other file or folder is used whole; of a Hub data set,
    the split `test` of the subset that may follow its name (NAME:SUBSET). Format and block length come from the run's settings.

    Raises:
        UserError: the data cannot be read, or the run held nothing out.
    """
    if name in config.data.names:
        _, held_out = load_blocks(config, tokenizer, "--perplexity")
        if held_out is None:
            problem = "was trained on, and the run held nothing out"
            raise UserError("--perplexity", name, problem, "use another text")
        return held_out, f"what training held out of {name}"
    local = is_local(name)
    source_name, _, subset = (name, "", "") if local else name.partition(":")
    split = "" if local else "test"
    changes: dict[str, Any] = {"dataset": source_name, "subset": subset or None, "eval_split": None}
    if local and not name.lower().endswith(TABLE_SUFFIXES):
        changes["format"] = "auto"  # the run's format may be that of records
    data = config.data.model_copy(update=changes)
    source = open_source(data, [source_name], split, "--perplexity")
    return source_blocks(source, data, tokenizer, f"--perplexity {name}"), f"{name}, split {split}" if split else name


def choose_blocks(model: Any, blocks: TrainingBlocks, name: str, source: AdapterSource) -> tuple[TrainingBlocks, str]:
    """Return the blocks that are measured, at most data.max_eval_samples, and their name.

    Records share blocks only where the model computes each as if alone; a line on standard error says if it does not.
    """
    if isinstance(blocks, RecordBlocks):
        blocks, reason = lay_out_exactly(model, blocks, source.provenance)
        if reason:
            print(describe_unpacked(reason), file=sys.stderr)
    limit = source.config.data.max_eval_samples
    return blocks.take(limit), f"{name}, its first {limit} blocks" if limit and limit < len(blocks) else name


def compare_perplexity(generator: Generator, blocks: TrainingBlocks, name: str, config: Config) -> Comparison:
    """Measure the base model and the adapter on the blocks; the base model alone where the generator has no adapter.

    Args:
        name: of the blocks.
        config: the adapter's run: its batch size, which fits in memory, and its block length.
    """
    losses_of, batch_size = library_losses(generator.engine.model), config.training.batch_size
    with generator.adapter_off():
        base_losses, counts = measure_block_losses(losses_of, blocks, batch_size)
    base = from_block_losses(base_losses, counts)
    definition = base.definition(config.data.max_length, blocks.join_rule)
    if generator.fixed == "--base_only":
        return Comparison(name, base, None, None, definition)
    adapter_losses, _ = measure_block_losses(losses_of, blocks, batch_size)
    difference = loss_difference(base_losses, adapter_losses, counts)
    return Comparison(name, base, from_block_losses(adapter_losses, counts), difference, definition)
