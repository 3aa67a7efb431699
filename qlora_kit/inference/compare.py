"""Is it better than before? Perplexity of the base model and of the adapter on the same blocks, and of their difference."""

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.config import Config
from qlora_kit.data.blocks import Blocks, RecordBlocks
from qlora_kit.data.dataset import load_blocks, source_blocks
from qlora_kit.data.source import TABLE_SUFFIXES, open_source
from qlora_kit.errors import UserError
from qlora_kit.inference.generator import Generator
from qlora_kit.inference.modes import as_line
from qlora_kit.model.hub import is_local
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
    """On the same blocks; `adapter` and `difference` are None where the base model alone was measured."""

    data: str
    base: Perplexity
    adapter: Perplexity | None
    difference: Difference | None
    definition: str

    def as_object(self) -> dict[str, Any]:
        """A line of --json; a standard error that does not exist is null."""
        measured = {"base": self.base, "adapter": self.adapter}
        fields = {name: result.as_json() for name, result in measured.items() if result is not None}
        if self.difference is not None:
            fields["difference"] = self.difference.as_json()
        return {"perplexity": {"data": self.data, **fields, "definition": self.definition}}

    def lines(self) -> list[str]:
        found = [f"perplexity on {self.data}", f"  base        {self.base}"]
        if self.adapter and self.difference:
            loss, error = self.difference
            found.append(f"  adapter     {self.adapter}")
            found.append(
                f"  difference  {plus_minus(loss, error, '+.4f')} nats per token (adapter - base, standard error "
                f"of the blocks' own differences): {self.verdict()}"
            )
        return [*found, f"  {self.definition}"]

    def verdict(self) -> str:
        """Two standard errors are about 95 % of a normal distribution."""
        assert self.difference is not None
        loss, error = self.difference
        if loss == 0:
            return "the adapter does nothing here"
        if math.isnan(error):
            return "one block says nothing about the error; use more text"
        if abs(loss) < 2 * error:
            return "no difference that this text can show"
        return "the adapter is better" if loss < 0 else "the adapter is worse"


def evaluation_blocks(name: str, config: Config, tokenizer: "PreTrainedTokenizerBase") -> tuple[Blocks | RecordBlocks, str]:
    """Blocks to measure on, and what they are of.

    The data set of training gives the blocks that the run held out; any other file or folder is taken whole, and a Hub data set's
    split `test`, of the subset that may follow its name (NAME:SUBSET). Format, block length and the number of blocks at most
    go by the run's own settings.

    Raises:
        UserError: it cannot be read, or the run held nothing out.
    """
    most = config.data.max_eval_samples
    if name in config.data.names:
        _, held_out = load_blocks(config, tokenizer, "--perplexity")
        if held_out is None:
            raise UserError(f"--perplexity {name}: the adapter was trained on it and nothing was held out; name another text")
        return held_out, f"what training held out of {name}"
    local = is_local(name)
    place, _, subset = (name, "", "") if local else name.partition(":")
    split = "" if local else "test"
    changes: dict[str, Any] = {"dataset": place, "subset": subset or None, "eval_split": None}
    if local and not name.lower().endswith(TABLE_SUFFIXES):
        changes["format"] = "auto"  # a run on records states the format of those
    data = config.data.model_copy(update=changes)
    source = open_source(data, [place], split, "--perplexity")
    blocks = source_blocks(source, data, tokenizer, f"--perplexity {name}")
    what = f"{name}, split {split}" if split else name
    return blocks.take(most), f"{what}, its first {most} blocks" if most and most < len(blocks) else what


def compare_perplexity(
    generator: Generator, blocks: Blocks | RecordBlocks, batch_size: int, data: str, block_length: int, base_only: bool
) -> Comparison:
    """Every block through the base model and, but for `base_only`, through the adapter, in one process."""
    losses_of = library_losses(generator.engine.model)
    with generator.adapter_off():
        base, counts = measure_block_losses(losses_of, blocks, batch_size)
    measured = from_block_losses(base, counts)
    definition = measured.definition(block_length, blocks.join_rule)
    if base_only:
        return Comparison(data, measured, None, None, definition)
    adapter, _ = measure_block_losses(losses_of, blocks, batch_size)
    difference = loss_difference(base, adapter, counts)
    return Comparison(data, measured, from_block_losses(adapter, counts), difference, definition)


def run_perplexity(
    generator: Generator,
    blocks: Blocks | RecordBlocks,
    what: str,
    config: Config,
    as_json: bool,
    base_only: bool,
    to_stderr: bool,
) -> None:
    """Measure and print; with `to_stderr` beside answers that have standard output for themselves."""
    print(f"Measuring perplexity on {what}: {len(blocks):,} blocks", file=sys.stderr)
    found = compare_perplexity(generator, blocks, config.training.batch_size, what, config.data.max_length, base_only)
    if as_json:
        print(as_line(found.as_object()), flush=True)
    else:
        print("\n".join(found.lines()), file=sys.stderr if to_stderr else sys.stdout, flush=True)
