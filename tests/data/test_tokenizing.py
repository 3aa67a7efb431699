"""Records -> ids and labels by position, checked and cut to length; expectations are written by hand."""

import numpy as np
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from qlora_kit.data import encoding
from qlora_kit.data.encoding import encode_text
from qlora_kit.data.rendering import Piece, Rendering
from qlora_kit.data.tokenizing import EncodedRecord, check_trained, encode_records, find_end_id, render_record, shorten
from qlora_kit.errors import BadRecord, UserError
from tests.data.made_tokenizers import make_tokenizer

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


def plain(*pieces: tuple[str, bool]) -> Rendering:
    return Rendering([Piece(*piece) for piece in pieces], is_plain=True)


def test_the_ids_of_a_record_are_those_of_its_whole_text(tokenizer):
    pieces = [("user\n", False), ("Hello", True), (" there", True), ("\n", False)]
    (record,) = encode_records([plain(*pieces)], tokenizer)
    assert record.ids.tolist() == tokenizer.encode("user\nHello there\n", add_special_tokens=False)
    lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text, _ in pieces]
    assert record.trained.tolist() == np.repeat([trained for _, trained in pieces], lengths).tolist()
    assert (record.ids.dtype, record.trained.dtype, record.labels().dtype) == (np.int32, bool, np.int64)


def test_no_token_joins_the_end_of_a_prompt_with_its_answer(tokenizer):
    assert len(tokenizer.encode(" the", add_special_tokens=False)) == 1
    (record,) = encode_records([plain((" t", False), ("he", True))], tokenizer)
    assert [tokenizer.decode([token]) for token in record.ids.tolist()] == [" t", "he"]


@pytest.mark.parametrize(("answer", "tokens"), [(" the", ["▁the"]), ("\nthe", ["<0x0A>", "t", "he"])])
def test_where_no_token_joins_a_prompt_with_its_answer_no_space_is_put_between_them(answer, tokens):
    """A SentencePiece tokenizer on its own would begin the answer with a space."""
    tokenizer = make_tokenizer("zephyr")
    (record,) = encode_records([plain(("The", False), (answer, True))], tokenizer)
    assert tokenizer.convert_ids_to_tokens(record.ids.tolist()) == ["<s>", "▁The", *tokens]


@pytest.mark.parametrize("name", ["zephyr", "mistral"])
def test_an_answer_that_a_token_joins_to_its_prompt_begins_with_no_space_of_its_own(name):
    tokenizer = make_tokenizer(name)
    (record,) = encode_records([plain(("The ", False), ("sea", True))], tokenizer)
    assert tokenizer.convert_ids_to_tokens(record.ids.tolist()) == ["<s>", "▁The", "▁", "s", "ea"]
    assert record.trained.tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("name", ["tiny", "zephyr"])
def test_a_long_prompt_is_not_encoded_twice(name, monkeypatch):
    """With its answer and without it, which costs a third of the time where no control token stands between them."""
    tokenizer, encode, seen = make_tokenizer(name), encoding._encode_batch, []
    monkeypatch.setattr(encoding, "_encode_batch", lambda texts, tokenizer: seen.extend(texts) or encode(texts, tokenizer))
    pieces = [("### Instruction:\n" + "The sea rises. " * 100 + "\n\n### Response:\n", False), ("It falls.", True)]
    (record,) = encode_records([plain(*pieces)], tokenizer)
    text = pieces[0][0] + pieces[1][0]
    assert record.ids.tolist() == tokenizer(text)["input_ids"]
    assert sum(map(len, seen)) < 1.2 * len(text)


def test_a_tokenizer_in_python_is_one_problem():
    tokenizer = ByT5Tokenizer()
    assert encode_text("Hi", tokenizer) == tokenizer("Hi", add_special_tokens=False)["input_ids"]
    with pytest.raises(UserError, match=r"model\.name: .*without a fast version"):
        encode_records([plain(("Hi", True))], tokenizer)


def test_records_come_back_in_their_order_and_empty_batches_empty(tokenizer):
    words = ["one", "two", "one", "three"]
    records = encode_records([plain((word, True)) for word in words], tokenizer)
    assert [tokenizer.decode(record.ids.tolist()) for record in records] == words
    assert encode_records([], tokenizer) == []


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
    (record,) = encode_records([plain(("Hi ", False), (words, True))], tokenizer)
    assert record.ids[record.trained].tolist() == tokenizer.encode(words, add_special_tokens=False)


# Records that stop a run


def test_a_record_that_trains_its_end_is_accepted():
    check_trained(encoded([1, 2, END], [False, True, True]), (END,))


@pytest.mark.parametrize("trained", [[False, False, False], [True, False, False]])
def test_a_record_that_trains_on_nothing_is_refused(trained):
    with pytest.raises(BadRecord, match="no token is trained, expected an answer"):
        check_trained(encoded([1, 2, END], trained), (END,))


def test_a_record_whose_end_is_no_label_is_refused():
    with pytest.raises(BadRecord, match="no end-of-turn token is trained"):
        check_trained(encoded([1, 2, END], [False, True, False]), (END,))


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
