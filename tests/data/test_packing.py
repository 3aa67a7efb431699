"""Records -> blocks: nothing lost, nothing split, little padding; records that are too long are cut or dropped, and counted."""

import time

import numpy as np
import pytest

from qlora_kit.data.packing import count_labels, pack
from qlora_kit.errors import UserError
from tests.data.builders import PAD, record_blocks


def packed(lengths, capacity: int) -> list[list[int]]:
    order, bounds = pack(np.array(lengths), capacity)
    return [numbers.tolist() for numbers in np.split(order, bounds[1:-1])]


def test_best_fit_by_hand():
    """Longest first: the 6, the 5 and the 4 fit into no common block, the 3 goes to the 5 (room 3), the 2 to the 6 (room 2)."""
    assert packed([2, 6, 3, 5, 4], 8) == [[0, 1], [2, 3], [4]]


def test_the_block_with_the_least_room_is_taken():
    """The 3 fits into the block of the 5 (room 3) and into that of the 4 (room 4)."""
    assert packed([5, 4, 3], 8) == [[0, 2], [1]]


def test_a_full_record_is_a_block_of_its_own():
    assert packed([8, 8, 1], 8) == [[0], [1], [2]]


def test_blocks_are_in_the_order_of_their_earliest_record():
    firsts = [block[0] for block in packed(np.random.default_rng(1).integers(1, 30, 200), 64)]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("seed", range(5))
def test_every_record_is_in_one_block_and_no_block_is_too_long(seed):
    lengths = np.random.default_rng(seed).integers(1, 65, 500)
    blocks = packed(lengths, 64)
    assert sorted(number for block in blocks for number in block) == list(range(500))
    assert all(sum(lengths[block]) <= 64 for block in blocks)


def test_the_same_lengths_are_packed_the_same_way():
    lengths = np.random.default_rng(1).integers(1, 513, 1000)
    assert packed(lengths, 512) == packed(lengths.copy(), 512)


def chat_lengths(count: int, capacity: int) -> np.ndarray:
    """Log-normal lengths, as instructions and chats have: a median of 120 tokens, some of thousands, limited to the capacity."""
    return np.random.default_rng(0).lognormal(np.log(120), 0.9, count).astype(int).clip(8, capacity)


@pytest.mark.parametrize("capacity", [512, 2048])
def test_ten_thousand_mixed_records_fill_98_percent(capacity):
    lengths = chat_lengths(10_000, capacity)
    _, bounds = pack(lengths, capacity)
    assert lengths.sum() / ((len(bounds) - 1) * capacity) >= 0.98


def test_packing_does_not_search_all_blocks():
    """A search over blocks would take hours for 300,000 records; this takes about a second."""
    start = time.perf_counter()
    pack(chat_lengths(300_000, 4096), 4096)
    assert time.perf_counter() - start < 20


def test_long_records_are_cut_from_the_left_and_counted():
    blocks = record_blocks("pppppppaaa", "pa" * 6, "pa")
    first = blocks[0]
    assert first["input_ids"].tolist() == list(range(102, 110))
    assert first["labels"].tolist() == [-100] * 5 + [107, 108, 109]
    counts = blocks.counts
    assert (counts.records, counts.tokens, counts.longest) == (3, 24, 12)
    assert (counts.cut, counts.cut_tokens, counts.dropped, counts.dropped_tokens) == (2, 6, 0, 0)
    assert counts.trained == 3 + 4 + 1 and counts.trained_share == 8 / 18


def test_records_that_cannot_be_cut_are_dropped_and_counted():
    blocks = record_blocks("paaaaaaaaa", "pa", "ppppppppppa", too_long="drop")
    assert [blocks[0][key].tolist() for key in ("input_ids", "labels")] == [[100, 101] + [PAD] * 6, [-100, 101] + [-100] * 6]
    assert len(blocks) == 1
    assert (blocks.counts.dropped, blocks.counts.dropped_tokens, blocks.counts.trained) == (2, 21, 1)
    assert record_blocks("paaaaaaaaa", "pa").counts.dropped == 1  # its answer does not fit either way


def test_when_no_record_fits_the_run_ends_with_one_problem():
    with pytest.raises(
        UserError,
        match=r"data\.dataset: has no record that fits into data\.max_length 8 \(records: 2, the shortest of 10 tokens",
    ):
        record_blocks("p" + "a" * 9, "p" + "a" * 11)


def test_a_share_of_the_records_is_packed_alone():
    blocks = record_blocks("ppaa", "pa", "ppa", numbers=[0, 2])
    assert blocks[0]["input_ids"].tolist() == [100, 101, 102, 103, 100, 101, 102, PAD]
    assert (blocks.documents, blocks.counts.trained, blocks.tokens) == (2, 3, 7)


def test_labels_are_counted_by_record():
    flags = np.array([1, 1, 0, 1, 0, 1, 1], dtype=bool)
    begins, ends = np.array([0, 3, 5]), np.array([3, 5, 7])
    assert count_labels(flags, begins, ends).tolist() == [1, 0, 1]
    assert count_labels(flags, begins[:2], ends[:2]).tolist() == [1, 0]
