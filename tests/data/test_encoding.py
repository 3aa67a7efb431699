"""Strings -> ids: texts with what begins them, and stretches of a text, against transformers' tokens of the whole text."""

import pytest
from tokenizers import normalizers, processors
from transformers import AutoTokenizer

from qlora_kit.data.encoding import (
    STRETCH,
    encode_stretches,
    encode_strings,
    encode_text,
    find_seam,
    split_into_stretches,
)
from qlora_kit.data.tokenizing import encode_documents
from tests.data.made_tokenizers import TEMPLATES, make_tokenizer

KINDS = ["tiny", *TEMPLATES]
LINES = "The sea rises.\n\nIt  falls. 你好 🙂\n" * (STRETCH // 12)  # three stretches


def test_truncation_and_padding_of_a_tokenizer_file_change_nothing(tiny_dir):
    limited = AutoTokenizer.from_pretrained(tiny_dir)
    expected = encode_strings(["sea " * 20, "sea"], limited)
    limited.backend_tokenizer.enable_truncation(4)
    limited.backend_tokenizer.enable_padding()
    assert encode_strings(["sea " * 20, "sea"], limited) == expected


@pytest.mark.parametrize("name", KINDS)
def test_a_text_begins_as_the_tokenizer_begins_texts_and_once(name):
    tokenizer = make_tokenizer(name)
    assert encode_text("The sea", tokenizer) == tokenizer("The sea")["input_ids"]
    begun = f"{tokenizer.bos_token or ''}The sea"
    assert encode_text(begun, tokenizer) == tokenizer(begun, add_special_tokens=False)["input_ids"]


def test_a_text_that_may_go_on_has_no_end(tiny_dir):
    framing = AutoTokenizer.from_pretrained(tiny_dir)
    start, end = "<|im_start|>", "<|endoftext|>"  # in the place of [CLS] and [SEP]
    ids = [(token, framing.convert_tokens_to_ids(token)) for token in (start, end)]
    framing.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)
    assert framing("The sea")["input_ids"] == [*encode_text("The sea", framing), ids[1][1]]


@pytest.mark.parametrize("name", KINDS)
def test_wherever_no_token_joins_two_stretches_they_have_the_tokens_of_their_text(name):
    text = "The\n sea, 你好\n\nand salt in the water "
    tokenizer = make_tokenizer(name)
    (whole,) = encode_strings([text], tokenizer)
    borders = 0
    for at in range(1, len(text)):
        first, second = encode_stretches([(text[:at], False), (text[at:], True)], tokenizer)
        if whole[: len(first)] == first:
            assert first + second == whole
            borders += 1
    assert borders > 8


@pytest.mark.parametrize("name", KINDS)
def test_a_long_document_begins_and_ends_once_and_has_the_tokens_of_the_whole(name):
    tokenizer = make_tokenizer(name)
    assert len(list(split_into_stretches([(LINES, True)], tokenizer))) > 2
    stretches = encode_documents([(LINES[:99], False), (LINES[99:], True), ("Salt", True)], tokenizer, -1)
    whole = [tokenizer(text, verbose=False)["input_ids"] for text in (LINES, "Salt")]
    assert [token for ids, _ in stretches for token in ids] == [*whole[0], -1, *whole[1], -1]


def test_text_is_split_at_a_line_end_or_else_between_words():
    tokenizer = make_tokenizer("tiny")
    lines = "The sea rises and falls.\n" * (STRETCH // 10)
    assert lines[find_seam(lines, tokenizer) - 1] == "\n"
    words = "tide " * (STRETCH // 2)
    assert words[find_seam(words, tokenizer) :].startswith(" tide")


def test_text_is_never_split_where_its_parts_have_other_tokens_than_the_whole(tiny_dir):
    stripping = AutoTokenizer.from_pretrained(tiny_dir)
    stripping.backend_tokenizer.normalizer = normalizers.Strip()  # of every stretch
    assert find_seam("The sea rises and falls.\n" * (STRETCH // 10), stripping) == 0
