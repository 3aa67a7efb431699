"""Records -> blocks of one length, several records each, as few blocks as can be.

Best-fit decreasing: the longest record first, each into the block with the least room that still holds it. Which records share
a block says nothing about them, so the model is told where each begins (`starts`) and lets it see itself only.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_kit.config import DataConfig
from qlora_kit.encoding import IGNORED, Encoded, shorten
from qlora_kit.errors import UserError
from qlora_kit.storage import Tokens

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
    recognised: bool  # the format by its keys, and not stated
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

    def record(self, number: int) -> Encoded:
        """A record as it is trained."""
        where = slice(self.begins[number], self.begins[number] + self.lengths[number])
        return Encoded(self.stored.ids[where], self.stored.trained[where])

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

    def summary(self) -> str:
        return f"{self.counts.records:,} {self.join_rule}"

    def description(self) -> str:
        """What the log says of training data."""
        counts = self.counts
        said = [
            f"{self.summary()}{' (format recognised by its keys)' if self.recognised else ''}",
            f"{counts.tokens:,} tokens, {100 * counts.trained_share:.1f} % trained, longest {counts.longest:,}",
            f"{len(self):,} blocks of {self.length} tokens, {100 * self.fill:.1f} % full",
            f"{counts.cut:,} records cut by {counts.cut_tokens:,} tokens" if counts.cut else "",
            f"{counts.dropped:,} records of {counts.dropped_tokens:,} tokens dropped" if counts.dropped else "",
        ]
        return "; ".join(filter(None, said))


def build_record_blocks(stored: Tokens, numbers: Sequence[int], data: DataConfig, pad_id: int, key: str) -> RecordBlocks:
    """The records of these numbers, cut or dropped where they are too long, in blocks.

    Raises:
        UserError: every record is too long.
    """
    import numpy as np

    chosen = np.asarray(numbers, dtype=np.int64)
    begins = np.concatenate([np.zeros(1, np.int64), stored.ends])[chosen]
    ends = stored.ends[chosen]
    full = ends - begins
    lengths = full.copy()
    for number in np.flatnonzero(full > data.max_length):
        where = slice(begins[number], ends[number])
        record = Encoded(stored.ids[where], stored.trained[where])
        lengths[number] = len(shorten(record, data.max_length, data.too_long, data.train_on) or ())
    kept = np.flatnonzero(lengths)
    if not len(kept):
        raise UserError(
            f"{key}: none of {len(full):,} records fits into data.max_length {data.max_length}; "
            f"the shortest has {full.min():,} tokens, the longest {full.max():,}"
        )
    begins = ends - lengths  # what is cut stands to the left
    order, bounds = pack(lengths[kept], data.max_length) if data.packing else (np.arange(len(kept)), np.arange(len(kept) + 1))
    counts = Counts(
        records=len(full),
        tokens=int(full.sum()),
        trained=int(count_labels(stored.trained, begins[kept], ends[kept]).sum()),
        longest=int(full.max()),
        cut=int(((lengths < full) & (lengths > 0)).sum()),
        cut_tokens=int((full - lengths)[kept].sum()),
        dropped=int((lengths == 0).sum()),
        dropped_tokens=int(full[lengths == 0].sum()),
    )
    return RecordBlocks(
        stored=stored,
        numbers=chosen,
        begins=begins,
        lengths=lengths,
        order=kept[order],
        bounds=bounds,
        length=data.max_length,
        pad_id=pad_id,
        packed=data.packing,
        full_lengths=full,
        counts=counts,
        formats=stored.about["formats"],
        train_on=data.train_on,
        recognised=data.format == "auto",
    )


def count_labels(flags: "np.ndarray", begins: "np.ndarray", ends: "np.ndarray") -> "np.ndarray":
    """How many flags (tokens,) are set in each record, (records,) int64; a record's first token is never a label."""
    import numpy as np

    borders = np.stack([begins + 1, ends], axis=1).ravel()
    if borders[-1] == len(flags):  # reduceat takes no border at the very end
        borders = borders[:-1]
    return np.add.reduceat(flags, borders, dtype=np.int64)[::2]


def pack(lengths: "np.ndarray", capacity: int) -> tuple["np.ndarray", "np.ndarray"]:
    """Lengths (records,), each from 1 to `capacity` -> which records share a block.

    Returns:
        order (records,) int64: numbers of the records, block after block; bounds (blocks + 1,) int64: where in it each begins.
        Blocks stand in the order of their earliest record, so that the first blocks are not those of the longest records.
    """
    import numpy as np

    blocks: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # blocks by the tokens they have room for
    rooms = 0  # bit n is set when a block has room for exactly n tokens: the least sufficient one is found without a search
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        sufficient = rooms >> length
        if sufficient:
            room = length + (sufficient & -sufficient).bit_length() - 1
            block = with_room[room].pop()
            rooms &= ~(1 << room) if not with_room[room] else -1
        else:
            room, block = capacity, len(blocks)
            blocks.append([])
        blocks[block].append(number)
        if left := room - length:
            with_room[left].append(block)
            rooms |= 1 << left
    blocks = sorted(map(sorted, blocks))
    bounds = np.cumsum([0, *map(len, blocks)], dtype=np.int64)
    return np.fromiter((number for block in blocks for number in block), dtype=np.int64, count=len(lengths)), bounds
