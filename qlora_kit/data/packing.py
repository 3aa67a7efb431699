"""Records -> blocks of one length, several records each, as few blocks as can be.

Best-fit decreasing: the longest record first, each into the block with the least room that still holds it. Which records share
a block says nothing about them, so the model is told where each begins (`starts`) and lets it see itself only.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_kit.config import DataSettings
from qlora_kit.data.blocks import Counts, RecordBlocks
from qlora_kit.data.token_cache import Tokens
from qlora_kit.data.tokenizing import EncodedRecord, shorten
from qlora_kit.errors import UserError

if TYPE_CHECKING:
    import numpy as np


def build_record_blocks(stored: Tokens, numbers: Sequence[int], data: DataSettings, pad_id: int, key: str) -> RecordBlocks:
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
        record = EncodedRecord(stored.ids[where], stored.trained[where])
        lengths[number] = len(shorten(record, data.max_length, data.too_long, data.train_on) or ())
    kept = np.flatnonzero(lengths)
    if not len(kept):
        problem = f"has no record that fits into data.max_length {data.max_length} (records: {len(full):,}, "
        problem += f"the shortest of {full.min():,} tokens, the longest of {full.max():,})"
        raise UserError(key, None, problem, "use a larger --max_length")
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
        format_recognised=data.format == "auto",
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
