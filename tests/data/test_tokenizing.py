"""Records -> ids and labels by position, checked and cut to length; expectations are written by hand."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from qlora_kit.data.rendering import Piece
from qlora_kit.data.tokenizing import (
    STRETCH,
    EncodedRecord,
    check_trained,
    encode_records,
    encode_strings,
    find_end_id,
    find_seam,
    render_record,
    shorten,
)
from qlora_kit.errors import BadRecord

END, START, NEWLINE = 6143, 6142, 198  # <|im_end|>, <|im_start|> and \n of the embedded tokenizer


def encoded(ids, trained) -> EncodedRecord:
    return EncodedRecord(np.array(ids, dtype=np.int32), np.array(trained, dtype=bool))


def labels_of(record: dict, kind: str, tokenizer, train_on="assistant") -> tuple[str, list[str]]:
    """The whole record and each run of labels, decoded."""
    (record,) = encode_records([render_record(record, kind, tokenizer, "text", train_on)], tokenizer)
    spans = [[]]
    for label in record.labels().tolist():
        spans[-1].append(label) if label >= 0 else spans.append([])
    return tokenizer.decode(record.ids.tolist()), [tokenizer.decode(span) for span in spans if span]


def test_the_ids_named_here_are_those_of_the_tokenizer(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"]) == [END, START]
    assert tokenizer.encode("\n") == [NEWLINE]


MESSAGES = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
    ]
}
RENDERED = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
)


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", ["Hello!<|im_end|>", "4<|im_end|>"]),
        ("last", ["4<|im_end|>"]),
        ("all", [RENDERED.removeprefix("<|im_start|>")]),  # but the first token, which is never predicted
    ],
)
def test_labels_are_the_answers_and_the_tokens_that_end_them(tokenizer, train_on, expected):
    assert labels_of(MESSAGES, "messages", tokenizer, train_on) == (RENDERED, expected)


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", ["hi<|im_end|>", "ho<|im_end|>"]),
        ("last", ["ho<|im_end|>"]),
    ],
)
def test_ready_made_text_trains_its_responses(tokenizer, train_on, expected):
    text = "### Instruction:\nSay hi\n\n### Response:\nhi\n\n### Instruction:\nAgain\n\n### Response:\nho"
    whole, spans = labels_of({"text": text}, "instruction", tokenizer, train_on)
    assert whole.replace("<|im_end|>", "") == text
    assert spans == expected


def test_the_ids_of_a_record_are_those_of_its_pieces_one_by_one(tokenizer):
    pieces = [Piece("user\n", False), Piece("Hello", True), Piece(" there", True), Piece("\n", False)]
    (record,) = encode_records([pieces], tokenizer)
    parts = [tokenizer.encode(piece.text, add_special_tokens=False) for piece in pieces]
    assert record.ids.tolist() == [token for part in parts for token in part]
    expected = [piece.trained for piece, part in zip(pieces, parts, strict=True) for _ in part]
    assert record.trained.tolist() == expected
    assert (record.ids.dtype, record.trained.dtype, record.labels().dtype) == (np.int32, bool, np.int64)


def test_no_token_joins_the_end_of_a_prompt_with_its_answer(tokenizer):
    assert len(tokenizer.encode(" the", add_special_tokens=False)) == 1
    (record,) = encode_records([[Piece(" t", False), Piece("he", True)]], tokenizer)
    assert [tokenizer.decode([token]) for token in record.ids.tolist()] == [" t", "he"]


def test_records_come_back_in_their_order_and_empty_batches_empty(tokenizer):
    words = ["one", "two", "one", "three"]
    records = encode_records([[Piece(word, True)] for word in words], tokenizer)
    assert [tokenizer.decode(record.ids.tolist()) for record in records] == words
    assert encode_records([], tokenizer) == []


def test_truncation_and_padding_of_a_tokenizer_file_change_nothing(tiny_dir):
    limited = AutoTokenizer.from_pretrained(tiny_dir)
    expected = encode_strings(["sea " * 20, "sea"], limited)
    limited.backend_tokenizer.enable_truncation(4)
    limited.backend_tokenizer.enable_padding()
    assert encode_strings(["sea " * 20, "sea"], limited) == expected


def test_the_first_token_is_never_a_label():
    record = encoded([5, 6, 7], [True, True, False])
    assert record.labels().tolist() == [-100, 6, -100]
    assert record.trained.tolist() == [True, True, False]


@pytest.mark.parametrize("text", [None, 7, "a\0b", "\ud83d"])
def test_ready_made_text_must_be_text(tokenizer, text):
    with pytest.raises(BadRecord, match="text holds "):
        render_record({"text": text}, "instruction", tokenizer, "text", "assistant")


def test_a_word_of_more_than_a_million_characters_is_refused(tokenizer):
    record = {"prompt": "Hi", "completion": "x" * 1_000_001}
    with pytest.raises(BadRecord, match="1,000,000 characters without a space"):
        render_record(record, "completion", tokenizer, "text", "assistant")


def test_a_very_long_answer_has_the_tokens_of_the_whole(tokenizer):
    words = "The sea rises.\n\nIt falls. " * 20_000
    (record,) = encode_records([[Piece("Hi ", False), Piece(words, True)]], tokenizer)
    assert record.ids[record.trained].tolist() == tokenizer.encode(words, add_special_tokens=False)


# Records that stop a run


def test_a_record_that_trains_its_end_is_accepted():
    check_trained(encoded([1, 2, END], [False, True, True]), END)


@pytest.mark.parametrize("trained", [[False, False, False], [True, False, False]])
def test_a_record_that_trains_on_nothing_is_refused(trained):
    with pytest.raises(BadRecord, match="no token is trained, expected an answer"):
        check_trained(encoded([1, 2, END], trained), END)


def test_a_record_whose_end_is_no_label_is_refused():
    with pytest.raises(BadRecord, match="no end-of-turn token is trained"):
        check_trained(encoded([1, 2, END], [False, True, False]), END)


def test_chats_end_with_the_templates_token_and_ready_made_text_with_the_tokenizers(tiny_dir):
    base = AutoTokenizer.from_pretrained(tiny_dir, eos_token="<|endoftext|>")  # as in Qwen's base models
    assert base.convert_ids_to_tokens([find_end_id("messages", base), find_end_id("instruction", base)]) == [
        "<|im_end|>",
        "<|endoftext|>",
    ]


# Records that are too long

#        prompt         answer      prompt      answer      after it
LONG = [False] * 4 + [True] * 3 + [False] * 2 + [True] * 3 + [False]  # 13 tokens


@pytest.mark.parametrize("max_length", [13, 20])
@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_a_record_that_fits_stays_as_it_is(max_length, too_long):
    record = encoded(range(13), LONG)
    assert shorten(record, max_length, too_long) is record


@pytest.mark.parametrize("max_length", [5, 6, 12])
def test_a_long_record_loses_its_beginning(max_length):
    short = shorten(encoded(range(13), LONG), max_length, "cut")
    assert short.ids.tolist() == list(range(13 - max_length, 13))
    assert short.trained.tolist() == LONG[13 - max_length :]


@pytest.mark.parametrize("max_length", [1, 3, 4])
def test_a_record_whose_last_answer_does_not_fit_after_a_token_of_its_prompt_is_dropped(max_length):
    assert shorten(encoded(range(13), LONG), max_length, "cut") is None


def test_if_prompts_are_trained_the_end_of_a_long_record_is_kept():
    assert shorten(encoded(range(13), [True] * 13), 4, "cut", "all").ids.tolist() == [9, 10, 11, 12]


def test_long_records_are_dropped_if_too_long_is_drop():
    assert shorten(encoded(range(13), LONG), 12, "drop") is None


# Seams of running text


def test_text_is_split_at_a_line_end_or_else_between_words(tokenizer):
    lines = "The sea rises and falls.\n" * (STRETCH // 10)
    assert lines[find_seam(lines, tokenizer) - 1] == "\n"
    words = "tide " * (STRETCH // 2)
    assert words[find_seam(words, tokenizer) :].startswith(" tide")


def test_text_is_never_split_for_a_tokenizer_that_marks_the_beginning_of_each_text(tiny_dir):
    from tokenizers import normalizers

    marking = AutoTokenizer.from_pretrained(tiny_dir)
    marking.backend_tokenizer.normalizer = normalizers.Prepend("_")  # as Llama 2's tokenizer does
    assert find_seam("The sea rises and falls.\n" * (STRETCH // 10), marking) == 0
