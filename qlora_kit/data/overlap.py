"""Count evaluation data that are trained on, too: equal records, or equal documents or blocks of running text."""

from typing import NamedTuple

import numpy as np

from qlora_kit.data.blocks import RecordBlocks, TextBlocks, TrainingBlocks

SAMPLED = 8  # tokens of a unit that are compared first


class Units(NamedTuple):
    """Records, documents or blocks, as places in one array of tokens."""

    ids: np.ndarray  # (tokens,) int32
    begins: np.ndarray  # (units,) int64
    ends: np.ndarray  # (units,) int64

    def sketch(self) -> np.ndarray:
        """Return a number for each unit, (units,) int64, from its length and some of its tokens: equal for equal units."""
        lengths = self.ends - self.begins
        found = lengths.copy()
        for part in range(SAMPLED):
            found = found * 1_000_003 + self.ids[self.begins + lengths * part // SAMPLED]  # overflows as a hash does
        return found

    def content(self, chosen: np.ndarray) -> list[bytes]:
        """Return the tokens of the chosen units."""
        return [self.ids[self.begins[unit] : self.ends[unit]].tobytes() for unit in chosen]


def describe_overlap(train: TrainingBlocks, evaluation: TrainingBlocks | None) -> str | None:
    """Return in words how many records or documents of the evaluation data are trained on, too; None if there are none.

    Documents that are not whole in the blocks are not compared: blocks are, if no document is equal.
    """
    if isinstance(train, RecordBlocks) and isinstance(evaluation, RecordBlocks):
        pairs = {"records": (_find_records(train), _find_records(evaluation))}
    elif isinstance(train, TextBlocks) and isinstance(evaluation, TextBlocks):
        pairs = {"documents": (_find_documents(train), _find_documents(evaluation))}
        if train.ids.shape[1] == evaluation.ids.shape[1]:
            pairs["blocks"] = _find_blocks(train), _find_blocks(evaluation)
    else:
        return None
    for name, (known, asked) in pairs.items():
        if shared := count_shared(known, asked):
            return f"{shared:,} of {len(asked.begins):,} evaluation {name} are trained on, too: no measure of unseen text"
    return None


def count_shared(known: Units, asked: Units) -> int:
    """Return how many of the units `asked` are among the `known`."""
    known_sketch, asked_sketch = known.sketch(), asked.sketch()
    content = set(known.content(np.flatnonzero(np.isin(known_sketch, asked_sketch))))
    return sum(unit in content for unit in asked.content(np.flatnonzero(np.isin(asked_sketch, known_sketch))))


def _find_records(blocks: RecordBlocks) -> Units:
    """Return the records in the blocks as they were before any was cut."""
    chosen = blocks.order[: blocks.bounds[-1]]
    ends = blocks.begins[chosen] + blocks.lengths[chosen]
    return Units(blocks.stored.ids, ends - blocks.full_lengths[chosen], ends)


def _find_documents(blocks: TextBlocks) -> Units:
    """Return the documents that are in the blocks with all of their tokens."""
    ends = np.cumsum(blocks.full_lengths)
    whole = ends <= blocks.ids.size
    return Units(blocks.ids.reshape(-1), (ends - blocks.full_lengths)[whole], ends[whole])


def _find_blocks(blocks: TextBlocks) -> Units:
    begins = np.arange(len(blocks)) * blocks.ids.shape[1]
    return Units(blocks.ids.reshape(-1), begins, begins + blocks.ids.shape[1])
