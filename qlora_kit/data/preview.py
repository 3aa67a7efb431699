"""What a run would train on, to be looked at before it starts: the first records with their trained tokens marked, and counts.

Trained tokens are coloured on a terminal and stand between [[ and ]] elsewhere. Nothing but the tokenizer is loaded.
"""

import math
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from qlora_kit.config import Config
from qlora_kit.data.blocks import RecordBlocks, TextBlocks, TrainingBlocks
from qlora_kit.data.packing import count_labels
from qlora_kit.data.tokenizing import EncodedRecord
from qlora_kit.model.tokenizer import separator_id

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

SHOWN = 3  # records
LONGEST_SHOWN = 400  # tokens of a record
BINS = 8  # of the histogram, up to data.max_length
BAR = 40  # characters
INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal would obey instead of showing
TRAIN_ON = {"assistant": "every answer", "last": "the last answer", "all": "prompts and answers"}


def show_preview(
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    train: TrainingBlocks,
    evaluation: TrainingBlocks | None,
    console: Console,
) -> None:
    """Print the first records, the counts and the lengths of the training data."""
    for title, record in _choose_examples(train):
        console.print(Text(title, style="bold"))
        console.print(mark_trained(record, tokenizer, console.is_terminal), soft_wrap=True)
        console.print()
    rows = _describe_records(config, tokenizer, train) if isinstance(train, RecordBlocks) else _describe_text(tokenizer, train)
    if evaluation is not None:
        rows.append(("evaluation", f"{evaluation.summarise()}, {len(evaluation):,} blocks"))
    for name, value in [("source", ", ".join(config.data.names)), *rows]:
        console.print(Text(f"{name:<12}{value}"), soft_wrap=True)
    console.print()
    top = config.data.max_length if isinstance(train, RecordBlocks) else int(train.full_lengths.max())
    for line in draw_histogram(train.full_lengths, top):
        console.print(Text(line), soft_wrap=True)


def _choose_examples(train: TrainingBlocks) -> list[tuple[str, EncodedRecord]]:
    import numpy as np

    if isinstance(train, TextBlocks):
        return [("Block 1", EncodedRecord(train.ids[0], np.ones(train.ids.shape[1], dtype=bool)))]
    numbers = np.flatnonzero(train.lengths)[:SHOWN].tolist()
    return [(f"Record {number + 1}, {train.lengths[number]:,} tokens", train.record(number)) for number in numbers]


def mark_trained(record: EncodedRecord, tokenizer: "PreTrainedTokenizerBase", coloured: bool) -> Text:
    """The words of a record, its trained tokens marked."""
    import numpy as np

    text = Text()
    trained = record.labels() >= 0
    borders = np.flatnonzero(np.diff(trained[:LONGEST_SHOWN])) + 1
    for part in np.split(np.arange(min(len(record), LONGEST_SHOWN)), borders):
        ids = record.ids[part].tolist()
        words = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        words = INVISIBLE.sub(lambda match: repr(match.group())[1:-1], words)
        if not trained[part[0]]:
            text.append(words, style="dim")
        else:
            text.append(words if coloured else f"[[{words}]]", style="green")
    if len(record) > LONGEST_SHOWN:
        text.append(f" ... ({len(record) - LONGEST_SHOWN:,} more tokens)", style="italic")
    text.rstrip()  # the line end that a template puts behind the last turn
    return text


def _describe_records(config: Config, tokenizer: "PreTrainedTokenizerBase", train: RecordBlocks) -> list[tuple[str, str]]:
    data, counts = config.data, train.counts
    recognised = ", recognised by their keys" if data.format == "auto" else ""
    return [
        ("records", f"{counts.records:,} ({' and '.join(train.formats)}{recognised})"),
        ("tokens", f"{counts.tokens:,}"),
        ("trained", f"{100 * counts.trained_share:.1f} % ({TRAIN_ON[data.train_on]})"),
        ("longest", f"{counts.longest:,} tokens"),
        ("cut", f"{counts.cut:,} records, by {counts.cut_tokens:,} tokens of their beginning"),
        ("dropped", f"{counts.dropped:,} records of {counts.dropped_tokens:,} tokens"),
        ("blocks", f"{len(train):,} of {train.length:,} tokens, {100 * train.fill:.1f} % full"),
        ("template", _describe_template(train, tokenizer)),
        ("end token", _describe_end_token(train, tokenizer)),
    ]


def _describe_template(train: RecordBlocks, tokenizer: Any) -> str:
    if train.formats == ["instruction"]:
        return "none: the text is ready made"
    return "the tokenizer's chat template" if tokenizer.chat_template else "`Role: content` lines: the tokenizer has no template"


def _describe_end_token(train: RecordBlocks, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Whether each record teaches to stop: counted in the labels, not taken from the rules that made them."""
    import numpy as np

    end_ids = train.stored.about["end_ids"]
    kept = np.flatnonzero(train.lengths)
    stops = np.isin(train.stored.ids, end_ids) & train.stored.trained
    without = int((count_labels(stops, train.begins[kept], (train.begins + train.lengths)[kept]) == 0).sum())
    tokens = " and ".join(tokenizer.convert_ids_to_tokens(end_ids))
    return f"{tokens}, trained: {'yes' if not without else f'not in {without:,} records'}"


def _describe_text(tokenizer: "PreTrainedTokenizerBase", train: TextBlocks) -> list[tuple[str, str]]:
    separator = tokenizer.convert_ids_to_tokens(separator_id(tokenizer))
    return [
        ("documents", f"{train.documents:,} ({train.join_rule})"),
        ("tokens", f"{int(train.full_lengths.sum()):,}"),
        ("trained", "100.0 % (running text)"),
        ("longest", f"{int(train.full_lengths.max()):,} tokens"),
        ("blocks", f"{len(train):,} of {train.ids.shape[1]:,} tokens, tail of {train.tail_tokens:,} tokens left out"),
        ("separator", f"{separator} after each document, trained: yes"),
    ]


def draw_histogram(lengths: "np.ndarray", top: int) -> list[str]:
    """Lengths in tokens, before any is cut, as lines with bars; all beyond `top` in one line."""
    import numpy as np

    borders = np.unique(np.linspace(0, top, BINS + 1).astype(int))
    counts = [int(((lengths > low) & (lengths <= high)).sum()) for low, high in pairwise(borders)]
    names = [f"{low + 1:,} - {high:,}" for low, high in pairwise(borders)]
    if beyond := int((lengths > top).sum()):
        counts.append(beyond)
        names.append(f"more than {top:,}")
    bars = ["#" * math.ceil(BAR * count / max(counts)) for count in counts]
    lines = [f"{name:>16}  {count:>9,}  {bar}" for name, count, bar in zip(names, counts, bars, strict=True)]
    return [f"{'tokens':>16}  {'number':>9}", *(line.rstrip() for line in lines)]
