"""Pack records into few blocks of one length.

Best-fit decreasing: the longest record comes first, and each record goes into the block with the least room that still holds it.
Records that share a block are unrelated, so the model is given the position at which each begins (`starts`) and attends within a
record only.
"""

from collections.abc import Sequence

import numpy as np

from qlora_kit.config import DataSettings
from qlora_kit.data.blocks import Counts, RecordBlocks
from qlora_kit.data.token_cache import Tokens
from qlora_kit.data.tokenizing import EncodedRecord, shorten
from qlora_kit.errors import UserError


def build_record_blocks(stored: Tokens, numbers: Sequence[int], data: DataSettings, pad_id: int, key: str) -> RecordBlocks:
    """Return the records of these numbers in blocks; records that are too long are cut or dropped.

    Args:
        key: the flag or config key of the data, for messages.

    Raises:
        UserError: every record is too long.
    """
    chosen = np.asarray(numbers, dtype=np.int64)
    ends = stored.ends[chosen]
    full = ends - np.concatenate([np.zeros(1, np.int64), stored.ends])[chosen]
    lengths = _shorten_records(stored, ends, full, data)
    kept = np.flatnonzero(lengths)
    if not len(kept):
        problem = f"has no record that fits into data.max_length {data.max_length} (records: {len(full):,}, "
        problem += f"the shortest of {full.min():,} tokens, the longest of {full.max():,})"
        raise UserError(key, None, problem, "use a larger --max_length")
    order, bounds = pack(lengths[kept], data.max_length) if data.packing else (np.arange(len(kept)), np.arange(len(kept) + 1))
    return RecordBlocks(
        stored=stored,
        numbers=chosen,
        begins=ends - lengths,  # records are cut from the left
        lengths=lengths,
        order=kept[order],
        bounds=bounds,
        length=data.max_length,
        pad_id=pad_id,
        packed=bool(data.packing),
        full_lengths=full,
        counts=_count(stored, ends, full, lengths),
        formats=stored.about["formats"],
        train_on=data.train_on,
        format_recognised=data.format == "auto",
    )


def _shorten_records(stored: Tokens, ends: np.ndarray, full: np.ndarray, data: DataSettings) -> np.ndarray:
    """Return the lengths of the records after cutting, (records,) int64; 0 for a dropped record."""
    lengths = full.copy()
    for number in np.flatnonzero(full > data.max_length):
        where = slice(ends[number] - full[number], ends[number])
        record = EncodedRecord(stored.ids[where], stored.trained[where])
        lengths[number] = len(shorten(record, data.max_length, data.too_long, data.train_on) or ())
    return lengths


def _count(stored: Tokens, ends: np.ndarray, full: np.ndarray, lengths: np.ndarray) -> Counts:
    kept = lengths > 0
    return Counts(
        records=len(full),
        tokens=int(full.sum()),
        trained=int(count_labels(stored.trained, (ends - lengths)[kept], ends[kept]).sum()),
        longest=int(full.max()),
        cut=int(((lengths < full) & kept).sum()),
        cut_tokens=int((full - lengths)[kept].sum()),
        dropped=int((~kept).sum()),
        dropped_tokens=int(full[~kept].sum()),
    )


def count_labels(flags: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the number of set flags (tokens,) in each record, (records,) int64; the first token of a record is never a label."""
    borders = np.stack([begins + 1, ends], axis=1).ravel()
    if borders[-1] == len(flags):  # reduceat accepts no border at the very end
        borders = borders[:-1]
    return np.add.reduceat(flags, borders, dtype=np.int64)[::2]


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose which records share a block.

    Args:
        lengths: (records,), tokens of each record, from 1 to `capacity`.
        capacity: tokens of a block.

    Returns:
        order (records,) int64: the records block after block; bounds (blocks + 1,) int64: where each block begins in `order`.
        Blocks are in the order of their earliest record, so that the first blocks are not those of the longest records.
    """
    blocks: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # blocks by the tokens they have room for
    rooms = 0  # bit n is set if a block has room for exactly n tokens: the least sufficient one is found without a search
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
