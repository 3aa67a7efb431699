"""TextBlocks and RecordBlocks: what the Trainer iterates over."""

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_kit.data.token_cache import Tokens
from qlora_kit.data.tokenizing import IGNORED, EncodedRecord
from qlora_kit.errors import UserError

if TYPE_CHECKING:
    import numpy as np


TRAINED = {"assistant": "answers trained", "last": "last answers trained", "all": "prompts and answers trained"}


@dataclass(frozen=True)
class Counts:
    """What became of the records of a data set."""

    records: int  # all, those dropped too
    tokens: int  # of all, before any is cut
    trained: int  # labels that are not -100
    longest: int  # tokens, before any is cut
    cut: int  # records
    cut_tokens: int
    dropped: int  # records
    dropped_tokens: int

    @property
    def trained_share(self) -> float:
        """Of the tokens that are neither cut nor dropped."""
        return self.trained / (self.tokens - self.cut_tokens - self.dropped_tokens)


@dataclass(frozen=True)
class RecordBlocks:
    """Blocks of records, as a map-style data set for the Trainer.

    Item: input_ids, labels and, where blocks are packed, starts, each (T,) int64 with T = `length`; block, its own number.
    `starts` holds for each position the index at which its record begins: position i may look at j with starts[i] <= j <= i, and
    its own position is i - starts[i]. The padding at the end of a block is a record of its own. It is no label, nor is a record's
    first token.
    """

    stored: Tokens
    numbers: "np.ndarray"  # (records,) int64, which of the source's records they are
    begins: "np.ndarray"  # (records,) int64, first token of each record in `stored`, behind what was cut
    lengths: "np.ndarray"  # (records,) int64, at most `length`
    order: "np.ndarray"  # (records,) int64, records block after block
    bounds: "np.ndarray"  # (blocks + 1,) int64, where in `order` each block begins
    length: int
    pad_id: int
    packed: bool  # whether records share blocks
    full_lengths: "np.ndarray"  # (records,) int64, before any is cut
    counts: Counts
    formats: list[str]
    train_on: str
    format_recognised: bool  # the format by its keys, and not stated
    unit = "record"  # what `sources` counts

    @property
    def prompt_style(self) -> str:
        """How a prompt is to be given to the adapter: through the chat template, or as `### Instruction:` text."""
        return "instruction" if self.formats == ["instruction"] else "chat"

    @property
    def join_rule(self) -> str:
        """What a block is made of."""
        return f"{' and '.join(self.formats)} records, {TRAINED[self.train_on]}"

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        import numpy as np
        import torch

        ids = np.full(self.length, self.pad_id, dtype=np.int64)
        labels = np.full(self.length, IGNORED, dtype=np.int64)
        starts = np.zeros(self.length, dtype=np.int64)
        at = 0
        for number in self.order[self.bounds[index] : self.bounds[index + 1]]:
            record = self.record(number)
            end = at + len(record)
            ids[at:end], labels[at:end], starts[at:end] = record.ids, record.labels(), at
            at = end
        starts[at:] = at
        rows = {"input_ids": ids, "labels": labels} | ({"starts": starts} if self.packed else {})
        return {name: torch.from_numpy(row) for name, row in rows.items()} | {"block": index}

    def sources(self, block: int) -> list[int]:
        """Numbers of the records that a block holds, from 1, in the order of the whole source."""
        return (self.numbers[self.order[self.bounds[block] : self.bounds[block + 1]]] + 1).tolist()

    def record(self, number: int) -> EncodedRecord:
        """A record as it is trained."""
        where = slice(self.begins[number], self.begins[number] + self.lengths[number])
        return EncodedRecord(self.stored.ids[where], self.stored.trained[where])

    @property
    def documents(self) -> int:
        return self.counts.records

    @property
    def tokens(self) -> int:
        """Tokens in the blocks, padding not counted."""
        return int(self.lengths[self.order[: self.bounds[-1]]].sum())

    @property
    def fill(self) -> float:
        """Share of the blocks that is no padding."""
        return self.tokens / (len(self) * self.length)

    def take(self, count: int | None) -> "RecordBlocks":
        """The first blocks."""
        return self if count is None else replace(self, bounds=self.bounds[: count + 1])

    def fingerprint(self) -> str:
        """SHA-256 of all that decides what stands in the blocks."""
        digest = hashlib.sha256(repr((self.length, self.pad_id)).encode())
        order = self.order[: self.bounds[-1]]
        for array in (self.bounds, self.begins[order], self.lengths[order], self.stored.ids, self.stored.trained):
            for at in range(0, len(array), 2**20):
                digest.update(array[at : at + 2**20].tobytes())
        return digest.hexdigest()

    def summarise(self) -> str:
        return f"{self.counts.records:,} {self.join_rule}"

    def describe(self) -> str:
        """What the log says of training data."""
        counts = self.counts
        said = [
            f"{self.summarise()}{' (format recognised by its keys)' if self.format_recognised else ''}",
            f"{counts.tokens:,} tokens, {100 * counts.trained_share:.1f} % trained, longest {counts.longest:,}",
            f"{len(self):,} blocks of {self.length} tokens, {100 * self.fill:.1f} % full",
            f"{counts.cut:,} records cut by {counts.cut_tokens:,} tokens" if counts.cut else "",
            f"{counts.dropped:,} records of {counts.dropped_tokens:,} tokens dropped" if counts.dropped else "",
        ]
        return "; ".join(filter(None, said))


@dataclass(frozen=True)
class TextBlocks:
    """Token blocks of equal length, as a map-style data set for the Trainer."""

    ids: "np.ndarray"  # (blocks, block length), int32
    documents: int
    join_rule: str  # how rows became documents
    tail_tokens: int  # tokens at the end of the stream that filled no block
    full_lengths: Any = ()  # (documents,) int64, tokens of each with its separator
    unit = "training document"  # what `sources` counts
    prompt_style = "text"  # prompts are continued, no chat template is applied

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        block = torch.from_numpy(self.ids[index].astype("int64"))
        # The model shifts: position t is predicted from the ones before it.
        return {"input_ids": block, "labels": block, "block": index}

    @property
    def tokens(self) -> int:
        return int(self.ids.size)

    def take(self, count: int | None) -> "TextBlocks":
        return replace(self, ids=self.ids[:count])

    def sources(self, block: int) -> list[int]:
        """Numbers of the documents that a block holds, from 1, in the order of this data set; empty where they are not known."""
        import numpy as np

        length = self.ids.shape[1]
        ends = [block * length, (block + 1) * length - 1]  # first and last token
        first, last = np.searchsorted(np.cumsum(self.full_lengths), ends, side="right").tolist()
        return list(range(first + 1, last + 2)) if len(self.full_lengths) else []

    def fingerprint(self) -> str:
        """SHA-256 of the token ids: the same data, tokenizer and block length give the same value."""
        digest = hashlib.sha256()
        for at in range(0, len(self), 1024):  # a copy of all would be as large as the data
            digest.update(self.ids[at : at + 1024].tobytes())
        return digest.hexdigest()

    def summarise(self) -> str:
        return f"{self.documents:,} documents"

    def describe(self) -> str:
        """What the log says of training data."""
        blocks = f"{len(self):,} blocks of {self.ids.shape[1]} tokens, tail of {self.tail_tokens} tokens left out"
        return f"{self.summarise()} ({self.join_rule}), {blocks}"


TrainingBlocks = TextBlocks | RecordBlocks


def build_text_blocks(stored: Tokens, length: int, key: str) -> TextBlocks:
    """The stream of all documents as blocks.

    Raises:
        UserError: no text, or not even one block of it.
    """
    if not len(stored):
        raise UserError(key, None, "holds no text", "use another source")
    import numpy as np

    blocks = cut_into_blocks(stored.ids, length, len(stored), stored.about["join_rule"], key)
    return replace(blocks, full_lengths=np.diff(stored.ends, prepend=0))


def cut_into_blocks(stream: "np.ndarray", length: int, documents: int, join_rule: str, key: str) -> TextBlocks:
    """Cut a stream of ids into rows of `length`; what fills no row at the end is counted and left out.

    Raises:
        UserError: not even one block.
    """
    count = len(stream) // length
    if count == 0:
        shorter = f", or --max_length {len(stream)}" if len(stream) >= 8 else ""
        problem = f"has {len(stream)} tokens, which do not fill one block of data.max_length {length}"
        raise UserError(key, None, problem, f"use more text{shorter}")
    ids = stream[: count * length].reshape(count, length)
    return TextBlocks(ids, documents, join_rule, tail_tokens=len(stream) - count * length)
