"""TextBlocks and RecordBlocks: the map-style data sets that the Trainer iterates over."""

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self, Union

import numpy as np

from qlora_kit.data.notes import Rows, describe_notes
from qlora_kit.data.token_cache import Tokens
from qlora_kit.data.tokenizing import IGNORED, EncodedRecord
from qlora_kit.errors import UserError

if TYPE_CHECKING:
    import torch

Item = dict[str, Union["torch.Tensor", int]]  # int: `block`, its number

TRAINED = {"assistant": "answers trained", "last": "last answers trained", "all": "prompts and answers trained"}


@dataclass(frozen=True)
class Counts:
    """Numbers of records and tokens that were kept, cut and dropped."""

    records: int  # with the dropped ones
    tokens: int  # of all records, before any is cut
    trained: int  # labels that are not -100
    longest: int  # tokens, before any is cut
    cut: int  # records
    cut_tokens: int
    dropped: int  # records
    dropped_tokens: int

    @property
    def trained_share(self) -> float:
        """The trained share of the tokens that are neither cut nor dropped."""
        return self.trained / (self.tokens - self.cut_tokens - self.dropped_tokens)


@dataclass(frozen=True)
class RecordBlocks:
    """Blocks of one or more records.

    Item: `input_ids`, `labels` and, if `packed` or `marked`, `starts`, each (T,) int64 with T = `length`; `block`, its number.
    `starts` holds for each position the position at which its record begins: position i attends to j with starts[i] <= j <= i,
    and its position id is i - starts[i]. The padding at the end of a block counts as a record. Padding and the first token of
    each record have no label.
    """

    stored: Tokens
    numbers: np.ndarray  # (records,) int64, numbers of the records in their source
    begins: np.ndarray  # (records,) int64, the first token of each record in `stored` that is not cut
    lengths: np.ndarray  # (records,) int64, at most `length`; 0 for a dropped record
    order: np.ndarray  # (records,) int64, the records block after block
    bounds: np.ndarray  # (blocks + 1,) int64, where each block begins in `order`
    length: int
    pad_id: int
    packed: bool  # records share blocks
    full_lengths: np.ndarray  # (records,) int64, before any is cut
    counts: Counts
    formats: list[str]
    train_on: str
    format_recognised: bool  # by the keys, not set
    marked: bool = False  # `starts` says where a record ends, also if it has a block of its own
    taken: int | None = None  # by `take`
    unit = "record"  # the unit of `sources`

    @property
    def prompt_style(self) -> str:
        """The form of a prompt for the adapter: `chat` for the chat template, `instruction` for `### Instruction:` text."""
        return "instruction" if self.formats == ["instruction"] else "chat"

    @property
    def join_rule(self) -> str:
        """The content of a block in words."""
        return f"{' and '.join(self.formats)} records, {TRAINED[self.train_on]}"

    @property
    def notes(self) -> Rows:
        """Return what of the records is not trained, or was changed: names and words."""
        return describe_notes(self.stored.about)

    @property
    def most_records(self) -> int:
        """The most records of a block that `starts` tells apart, padding counted as one; 0 without `starts`."""
        return int(np.diff(self.bounds).max()) + 1 if self.packed or self.marked else 0

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> Item:
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
        rows = {"input_ids": ids, "labels": labels} | ({"starts": starts} if self.packed or self.marked else {})
        return {name: torch.from_numpy(row) for name, row in rows.items()} | {"block": index}

    def sources(self, block: int) -> list[int]:
        """Return the numbers of the records in a block, from 1, as the source counts them."""
        return (self.numbers[self.order[self.bounds[block] : self.bounds[block + 1]]] + 1).tolist()

    def record(self, number: int) -> EncodedRecord:
        """Return a record as it is trained, after cutting."""
        where = slice(self.begins[number], self.begins[number] + self.lengths[number])
        return EncodedRecord(self.stored.ids[where], self.stored.trained[where])

    @property
    def documents(self) -> int:
        """The number of records, with the dropped ones."""
        return self.counts.records

    @property
    def tokens(self) -> int:
        """Tokens in the blocks, without padding."""
        return int(self.lengths[self.order[: self.bounds[-1]]].sum())

    @property
    def fill(self) -> float:
        """The share of the blocks that is not padding."""
        return self.tokens / (len(self) * self.length)

    def take(self, count: int | None) -> Self:
        """Return the first `count` blocks, or all for None."""
        return self if count is None else replace(self, bounds=self.bounds[: count + 1], taken=count)

    def unpack(self) -> Self:
        """Return blocks of one record each, as many as were taken before."""
        order = np.flatnonzero(self.lengths)
        return replace(self, order=order, bounds=np.arange(len(order) + 1), packed=False).take(self.taken)

    def mark(self) -> Self:
        """Return the same blocks with `starts`."""
        return replace(self, marked=True)

    def sample(self) -> np.ndarray:
        """Return tokens for a trial of a model, (length,) int64: those of the first records, repeated if they are too few."""
        return np.resize(self.stored.ids[: self.length], self.length).astype(np.int64)

    def fingerprint(self) -> str:
        """Return the SHA-256 of everything that decides the content of the blocks."""
        digest = hashlib.sha256(repr((self.length, self.pad_id)).encode())
        order = self.order[: self.bounds[-1]]
        for array in (self.bounds, self.begins[order], self.lengths[order], self.stored.ids, self.stored.trained):
            for at in range(0, len(array), 2**20):
                digest.update(array[at : at + 2**20].tobytes())
        return digest.hexdigest()

    def summarise(self) -> str:
        """Return the number and formats of the records in words."""
        return f"{self.counts.records:,} {self.join_rule}"

    def describe(self) -> str:
        """Return the line of the log about training data."""
        counts = self.counts
        parts = [
            f"{self.summarise()}{' (format recognised by its keys)' if self.format_recognised else ''}",
            f"{counts.tokens:,} tokens, {100 * counts.trained_share:.1f} % trained, longest {counts.longest:,}",
            f"{len(self):,} blocks of {self.length} tokens, {100 * self.fill:.1f} % full",
            f"{counts.cut:,} records cut by {counts.cut_tokens:,} tokens" if counts.cut else "",
            f"{counts.dropped:,} records of {counts.dropped_tokens:,} tokens dropped" if counts.dropped else "",
        ]
        return "; ".join(filter(None, parts))


@dataclass(frozen=True)
class TextBlocks:
    """Blocks of running text, all of whose tokens are trained.

    Item: `input_ids` and `labels`, each (block length,) int64; `block`, its number.
    """

    ids: np.ndarray  # (blocks, block length), int32
    documents: int
    join_rule: str  # how rows became documents
    tail_tokens: int  # tokens at the end of the stream that fill no block
    # (documents,) int64, tokens of each document with its separator; empty if unknown
    full_lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    notes: Rows = field(default_factory=list)  # what of the rows is not trained
    unit = "training document"  # the unit of `sources`
    prompt_style = "text"  # prompts are continued, without a chat template

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Item:
        import torch

        block = torch.from_numpy(self.ids[index].astype("int64"))
        # The model shifts: position t is predicted from the positions before it.
        return {"input_ids": block, "labels": block, "block": index}

    @property
    def tokens(self) -> int:
        """Tokens in the blocks."""
        return int(self.ids.size)

    def take(self, count: int | None) -> "TextBlocks":
        """Return the first `count` blocks, or all for None."""
        return replace(self, ids=self.ids[:count])

    def sources(self, block: int) -> list[int]:
        """Return the numbers of the documents in a block, from 1, as this data set counts them; empty if unknown."""
        length = self.ids.shape[1]
        ends = [block * length, (block + 1) * length - 1]  # first and last token
        first, last = np.searchsorted(np.cumsum(self.full_lengths), ends, side="right").tolist()
        return list(range(first + 1, last + 2)) if len(self.full_lengths) else []

    def fingerprint(self) -> str:
        """Return the SHA-256 of the token ids."""
        digest = hashlib.sha256()
        for at in range(0, len(self), 1024):  # a copy of all ids would be as large as the data
            digest.update(self.ids[at : at + 1024].tobytes())
        return digest.hexdigest()

    def summarise(self) -> str:
        """Return the number of documents in words."""
        return f"{self.documents:,} documents"

    def describe(self) -> str:
        """Return the line of the log about training data."""
        blocks = f"{len(self):,} blocks of {self.ids.shape[1]} tokens, tail of {self.tail_tokens} tokens left out"
        return f"{self.summarise()} ({self.join_rule}), {blocks}"


TrainingBlocks = TextBlocks | RecordBlocks


def describe_unpacked(reason: str) -> str:
    """Return the line that says why records have blocks of their own although data.packing lets them share blocks."""
    return f"Records are not packed, each has a block of its own: {reason}"


def build_text_blocks(stored: Tokens, length: int, key: str) -> TextBlocks:
    """Cut the stream of all documents into blocks of `length` tokens; a tail that fills no block is left out.

    Args:
        key: the flag or config key of the data, for messages.

    Raises:
        UserError: the documents have no text, or fill no block.
    """
    if not len(stored):
        raise UserError(key, None, "holds no text", "use another source")
    tokens = len(stored.ids)
    count = tokens // length
    if count == 0:
        problem = f"has {tokens} tokens, which do not fill one block of data.max_length {length}"
        raise UserError(key, None, problem, "use more text" + (f", or --max_length {tokens}" if tokens >= 8 else ""))
    ids = stored.ids[: count * length].reshape(count, length)
    lengths, notes = np.diff(stored.ends, prepend=0), describe_notes(stored.about)
    return TextBlocks(ids, len(stored), stored.about["join_rule"], tokens - count * length, lengths, notes)
