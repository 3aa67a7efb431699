"""Print the data that a run would train on (--preview): the first records with trained tokens marked, and counts.

Trained tokens are green on a terminal, and between [[ and ]] elsewhere. Of the model only the tokenizer is loaded.
"""

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from qlora_kit.config import Config
from qlora_kit.data.blocks import RecordBlocks, TextBlocks, TrainingBlocks
from qlora_kit.data.notes import Rows
from qlora_kit.data.overlap import describe_overlap
from qlora_kit.data.packing import count_labels
from qlora_kit.data.splits import describe_files
from qlora_kit.data.tokenizing import EncodedRecord
from qlora_kit.errors import spell_out
from qlora_kit.model.tokenizer import separator_id
from qlora_kit.wrapping import fit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORDS_SHOWN = 3
TOKENS_SHOWN = 400  # of a record
BINS = 8  # of the histogram, up to data.max_length
BAR = 40  # characters
TRAIN_ON = {"assistant": "every answer", "last": "the last answer", "all": "prompts and answers"}


def show_preview(
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    train: TrainingBlocks,
    evaluation: TrainingBlocks | None,
    console: Console,
) -> None:
    """Print the first records, the counts and the lengths of the training data."""
    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    if coloured:
        console.print(Text("Trained tokens are green, the others dim.\n"))
    for title, record in _choose_examples(train):
        console.print(Text(title, style="bold"))
        console.print(mark_trained(record, tokenizer, coloured), soft_wrap=True)
        console.print()
    rows = _describe_records(config, tokenizer, train) if isinstance(train, RecordBlocks) else _describe_text(tokenizer, train)
    rows += train.notes
    if evaluation is not None:
        rows.append(("evaluation", f"{evaluation.summarise()}, {len(evaluation):,} blocks"))
        rows += [note for note in evaluation.notes if note not in train.notes]
    if overlap := describe_overlap(train, evaluation):
        rows.append(("overlap", overlap))
    for name, value in [("source", ", ".join(config.data.names)), *describe_files(config.data), *rows]:
        console.print(Text(fit(spell_out(f"{name:<12}{value}"), console.file)), soft_wrap=True)
    console.print()
    top = config.data.max_length if isinstance(train, RecordBlocks) else int(train.full_lengths.max())
    for line in draw_histogram(train.full_lengths, top, min(BAR, console.width - 30) if console.is_terminal else BAR):
        console.print(Text(line), soft_wrap=True)


def _choose_examples(train: TrainingBlocks) -> list[tuple[str, EncodedRecord]]:
    if isinstance(train, TextBlocks):
        return [("Block 1", EncodedRecord(train.ids[0], np.ones(train.ids.shape[1], dtype=bool)))]
    numbers = np.flatnonzero(train.lengths)[:RECORDS_SHOWN].tolist()
    return [(f"Record {number + 1}, {train.lengths[number]:,} tokens", train.record(number)) for number in numbers]


def mark_trained(record: EncodedRecord, tokenizer: "PreTrainedTokenizerBase", coloured: bool) -> Text:
    """Return the text of a record with its trained tokens marked: in green if `coloured`, else between [[ and ]]."""
    text = Text()
    trained = record.labels() >= 0
    borders = np.flatnonzero(np.diff(trained[:TOKENS_SHOWN])) + 1
    for positions in np.split(np.arange(min(len(record), TOKENS_SHOWN)), borders):
        ids = record.ids[positions].tolist()
        words = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        words = spell_out(words, kept="\n\t")
        if not trained[positions[0]]:
            text.append(words, style="dim")
        else:
            text.append(words if coloured else f"[[{words}]]", style="green")
    if len(record) > TOKENS_SHOWN:
        text.append(f" ... ({len(record) - TOKENS_SHOWN:,} more tokens)", style="italic")
    text.rstrip()  # the line end that a template writes after the last turn
    return text


def _describe_records(config: Config, tokenizer: "PreTrainedTokenizerBase", train: RecordBlocks) -> Rows:
    data, counts = config.data, train.counts
    recognised = ", recognised by their keys" if train.format_recognised else ""
    return [
        ("records", f"{counts.records:,} ({' and '.join(train.formats)}{recognised})"),
        ("tokens", f"{counts.tokens:,}"),
        ("trained", f"{100 * counts.trained_share:.1f} % ({TRAIN_ON[data.train_on]})"),
        ("longest", f"{counts.longest:,} tokens"),
        ("cut", f"{counts.cut:,} records, by {counts.cut_tokens:,} tokens of their beginning"),
        ("dropped", f"{counts.dropped:,} records of {counts.dropped_tokens:,} tokens"),
        ("blocks", f"{len(train):,} of {train.length:,} tokens, {100 * train.fill:.1f} % full"),
        ("template", _describe_template(config, train, tokenizer)),
        ("end token", _describe_end_token(train, tokenizer)),
    ]


def _describe_template(config: Config, train: RecordBlocks, tokenizer: "PreTrainedTokenizerBase") -> str:
    if train.formats == ["instruction"]:
        return "none: the text is ready made"
    if config.data.chat_template:
        return f"{config.data.chat_template} (data.chat_template)"
    return "the tokenizer's chat template" if tokenizer.chat_template else "`Role: content` lines: the tokenizer has no template"


def _describe_end_token(train: RecordBlocks, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the end tokens and whether every record trains one, counted in the labels themselves."""
    end_ids = train.stored.about["end_ids"]
    kept = np.flatnonzero(train.lengths)
    stops = np.isin(train.stored.ids, end_ids) & train.stored.trained
    end_ids = np.intersect1d(end_ids, train.stored.ids[stops]).tolist()
    without = int((count_labels(stops, train.begins[kept], (train.begins + train.lengths)[kept]) == 0).sum())
    tokens = " and ".join(tokenizer.convert_ids_to_tokens(end_ids))
    return f"{tokens}, trained: {'yes' if not without else f'not in {without:,} records'}"


def _describe_text(tokenizer: "PreTrainedTokenizerBase", train: TextBlocks) -> Rows:
    separator = tokenizer.convert_ids_to_tokens(separator_id(tokenizer))
    return [
        ("documents", f"{train.documents:,} ({train.join_rule})"),
        ("tokens", f"{int(train.full_lengths.sum()):,}"),
        ("trained", "100.0 % (running text)"),
        ("longest", f"{int(train.full_lengths.max()):,} tokens"),
        ("blocks", f"{len(train):,} of {train.ids.shape[1]:,} tokens, tail of {train.tail_tokens:,} tokens left out"),
        ("separator", f"{separator} after each document, trained: yes"),
    ]


def draw_histogram(lengths: np.ndarray, top: int, longest: int = BAR) -> list[str]:
    """Return a histogram of lengths in tokens, (records,), as lines with bars; lengths above `top` share one line."""
    borders = np.unique(np.linspace(0, top, BINS + 1).astype(int))
    counts = [int(((lengths > low) & (lengths <= high)).sum()) for low, high in pairwise(borders)]
    names = [f"{low + 1:,} - {high:,}" for low, high in pairwise(borders)]
    if above := int((lengths > top).sum()):
        counts.append(above)
        names.append(f"more than {top:,}")
    bars = ["#" * math.ceil(longest * count / max(counts)) for count in counts]
    lines = [f"{name:>16}  {count:>9,}  {bar}" for name, count, bar in zip(names, counts, bars, strict=True)]
    return [f"{'tokens':>16}  {'number':>9}", *(line.rstrip() for line in lines)]
