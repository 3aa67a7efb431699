"""Evaluation data that are in the training data, too."""

import numpy as np
import pytest

from qlora_kit.data.overlap import Units, count_shared, describe_overlap
from tests.data.builders import record_blocks, text_blocks


def units(*contents: list[int]) -> Units:
    lengths = np.array([len(content) for content in contents])
    return Units(np.concatenate(contents).astype(np.int32), np.cumsum(lengths) - lengths, np.cumsum(lengths))


def test_equal_units_are_counted_as_python_counts_them():
    """Short units of two different tokens, so that many are equal, or almost."""
    random = np.random.default_rng(0)
    known, asked = ([random.integers(2, size=random.integers(1, 12)).tolist() for _ in range(300)] for _ in range(2))
    expected = sum(unit in known for unit in asked)
    assert 100 < expected < 300 and count_shared(units(*known), units(*asked)) == expected


def test_units_that_differ_in_one_token_are_not_equal():
    whole = list(range(1000))
    for at in range(0, 1000, 7):
        assert count_shared(units(whole), units([*whole[:at], 5000, *whole[at + 1 :]])) == 0


def test_records_are_compared_whole_and_only_those_in_the_blocks():
    """The ids of these records count up from 100, so that records of one length are equal."""
    train = record_blocks("ppa", "ppaaa", "pppppppppppa")  # the last is cut, to 8 tokens
    assert describe_overlap(train, record_blocks("ppa", "ppppa", "ppaaaa")).startswith("2 of 3 evaluation records are trained on")
    assert describe_overlap(train, record_blocks("ppaaaa", "pa")) is None
    assert describe_overlap(train, record_blocks("ppppppppppa")) is None  # cut, too, to the same number of tokens
    assert describe_overlap(train, record_blocks("pppppppppppa")) is not None
    assert describe_overlap(train.take(1), record_blocks("pppppppppppa")) is None
    assert describe_overlap(train, None) is None


@pytest.mark.parametrize("lengths", [[8, 8, 8, 8], [32], [31, 1], [9, 23]], ids=str)
def test_equal_documents_of_text_are_counted_wherever_they_are(lengths):
    evaluation = text_blocks(range(32), 8, lengths)
    train = text_blocks([*range(100, 105), *range(32), *range(200, 220)], 8, [5, *lengths, 20])
    assert describe_overlap(train, evaluation).startswith(f"{len(lengths)} of {len(lengths)} evaluation documents")


def test_equal_blocks_are_counted_if_no_document_is_whole():
    text = text_blocks(range(100), 8)  # one document, whose last tokens fill no block
    assert describe_overlap(text, text.take(3)).startswith("3 of 3 evaluation blocks are trained on")
    assert describe_overlap(text, text_blocks(range(1, 100), 8)) is None
    assert describe_overlap(text, text_blocks(range(100), 16)) is None


def test_records_and_text_have_nothing_in_common():
    assert describe_overlap(text_blocks(range(100, 120), 8), record_blocks("ppaaaaaa")) is None
