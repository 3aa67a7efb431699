"""Blocks as the Trainer gets them: ids, labels and starts, without a token lost but the tail of running text."""

import numpy as np
import pytest
import torch

from qlora_kit.data.blocks import TextBlocks
from qlora_kit.errors import UserError
from qlora_kit.model.tokenizer import separator_id
from tests.data.builders import PAD, record_blocks, text_blocks

# Running text


def test_a_text_block_names_itself_and_its_documents():
    """Documents of 3, 9, 4 and 2 tokens in blocks of 4: the second block is within document 2, the fourth is document 3 alone."""
    blocks = text_blocks(range(18), 4, lengths=[3, 9, 4, 2])
    assert [blocks[number]["block"] for number in range(4)] == [0, 1, 2, 3]
    assert [blocks.sources(number) for number in range(4)] == [[1, 2], [2], [2], [3]]


def test_without_lengths_the_documents_of_a_block_are_unknown():
    assert TextBlocks(np.zeros((1, 4), np.int32), documents=2, join_rule="", tail_tokens=0).sources(0) == []


def test_blocks_and_tail_are_the_whole_stream():
    stream = list(range(23))
    blocks = text_blocks(stream, 8)
    assert torch.cat([blocks[index]["input_ids"] for index in range(len(blocks))]).tolist() == stream[:16]
    assert (len(blocks), blocks.tokens, blocks.tail_tokens) == (2, 16, 7)


def test_a_stream_that_fills_its_blocks_has_no_tail():
    blocks = text_blocks(range(16), 8)
    assert (len(blocks), blocks.tail_tokens) == (2, 0)


def test_a_stream_too_short_for_one_block_is_one_problem():
    with pytest.raises(UserError) as caught:
        text_blocks(range(9), 10)
    (problem,) = caught.value.lines
    assert problem.startswith("data.dataset: has 9 tokens") and "data.max_length 10" in problem and "--max_length 9" in problem


def test_a_source_without_text_is_one_problem():
    with pytest.raises(UserError, match=r"^data\.dataset: holds no text\. "):
        text_blocks([], 8, lengths=[])


def test_every_token_is_a_label_at_its_own_position_and_so_is_the_separator(tokenizer, stream_of):
    blocks = text_blocks(stream_of(["The sea.", "Salt.", "The Moon rises."]), 8)
    separator = separator_id(tokenizer)
    assert separator == tokenizer.pad_token_id  # collators that mask padding by id would not train it
    separators = 0
    for index in range(len(blocks)):
        assert blocks[index]["labels"].tolist() == blocks[index]["input_ids"].tolist()
        assert blocks[index]["labels"].dtype == torch.int64
        separators += blocks[index]["labels"].tolist().count(separator)
    assert separators >= 1


def test_take_keeps_the_first_text_blocks_and_none_keeps_all():
    blocks = text_blocks(range(32), 8)
    assert blocks.take(2).ids.tolist() == blocks.ids[:2].tolist()
    assert len(blocks.take(None)) == len(blocks.take(100)) == 4


def test_the_fingerprint_of_text_changes_with_the_data_and_with_nothing_else():
    first, same, other = text_blocks(range(16), 8), text_blocks(range(17), 8), text_blocks([*range(15), 99], 8)
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()


# Records


def test_a_packed_block_by_hand():
    blocks = record_blocks("ppaa", "pa")
    assert len(blocks) == 1
    block = blocks[0]
    assert all(row.dtype == torch.int64 and row.shape == (8,) for name, row in block.items() if name != "block")
    assert block["input_ids"].tolist() == [100, 101, 102, 103, 100, 101, PAD, PAD]
    assert block["labels"].tolist() == [-100, -100, 102, 103, -100, 101, -100, -100]
    assert block["starts"].tolist() == [0, 0, 0, 0, 4, 4, 6, 6]


def test_the_first_token_of_a_record_is_not_predicted_from_the_record_before():
    assert record_blocks("aaa", "aaa")[0]["labels"].tolist() == [-100, 101, 102, -100, 101, 102, -100, -100]


def test_without_packing_each_record_is_a_block():
    blocks = record_blocks("ppaa", "pa", packing=False)
    assert [block["input_ids"].tolist() for block in (blocks[0], blocks[1])] == [
        [100, 101, 102, 103, *[PAD] * 4],
        [100, 101, *[PAD] * 6],
    ]
    assert "starts" not in blocks[1]  # padding comes last, where no record attends to it


def test_a_full_block_has_no_padding():
    assert record_blocks("ppaaaaaa")[0]["starts"].tolist() == [0] * 8


def test_a_record_block_names_itself_and_its_records_as_the_source_counts_them():
    blocks = record_blocks("ppaa", "pa", "ppaaa", "pa", numbers=[0, 2, 3])  # 4, 5 and 2 tokens: the 2 goes to the 5
    assert [blocks[number]["block"] for number in range(len(blocks))] == [0, 1]
    assert [blocks.sources(number) for number in range(len(blocks))] == [[1], [3, 4]]


def test_fill_and_tokens_leave_padding_out():
    blocks = record_blocks("ppaa", "ppaaa", "pa")
    assert (len(blocks), blocks.tokens, blocks.fill) == (2, 11, 11 / 16)


def test_take_keeps_the_first_record_blocks():
    blocks = record_blocks("pppppaaa", "ppppppaa", "pa")
    assert len(blocks.take(2)) == 2 and blocks.take(2).tokens == 16
    assert len(blocks.take(None)) == len(blocks.take(9)) == 3


def test_the_fingerprint_of_records_depends_on_ids_and_labels():
    one = record_blocks("ppaa", "pa").fingerprint()
    assert one == record_blocks("ppaa", "pa").fingerprint()
    others = (("pppa", "pa"), ("ppaa", "paa"), ("ppaa",))
    assert len({one, *(record_blocks(*records).fingerprint() for records in others)}) == 4
