"""Test the lesson of formats: the trained tokens, counted by hand, and equal for equal turns."""

import json

import pytest

from finetuning_lessons import formats
from finetuning_lessons.formats import RECORDS, TWO_ROUNDS, encode_everything, encode_record, learns_to_stop, print_records
from finetuning_lessons.lesson import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def trained_words(encoded, tokenizer) -> str:
    return tokenizer.decode(encoded.ids[encoded.labels() >= 0])


@pytest.mark.parametrize("kind", RECORDS)
def test_answer_and_its_end_are_trained_and_nothing_else(kind, tokenizer):
    encoded = encode_record(RECORDS[kind], tokenizer)
    assert trained_words(encoded, tokenizer) == "Is the train late?<|im_end|>"
    assert learns_to_stop(encoded, tokenizer.convert_tokens_to_ids("<|im_end|>"))


def test_three_formats_give_the_same_tokens_and_labels(tokenizer):
    one, *others = (encode_record(RECORDS[kind], tokenizer) for kind in ("alpaca", "sharegpt", "messages"))
    assert all(other.ids.tolist() == one.ids.tolist() and other.labels().tolist() == one.labels().tolist() for other in others)


@pytest.mark.parametrize(
    ("train_on", "words"),
    [
        ("assistant", "The sea rises and falls.<|im_end|>Twice a day.<|im_end|>"),
        ("last", "Twice a day.<|im_end|>"),
    ],
)
def test_train_on_chooses_the_answers(train_on, words, tokenizer):
    assert trained_words(encode_record(TWO_ROUNDS, tokenizer, train_on), tokenizer) == words


def test_copied_labels_train_the_prompt_and_no_end(tokenizer):
    text = RECORDS["instruction"]["text"]
    encoded = encode_everything(text, tokenizer)
    assert tokenizer.decode(encoded.ids) == text
    assert (encoded.labels()[1:] >= 0).all() and encoded.labels()[0] == -100
    assert not learns_to_stop(encoded, tokenizer.convert_tokens_to_ids("<|im_end|>"))


def test_records_are_printed_as_json_that_can_be_copied(tokenizer, capsys):
    print_records(tokenizer)
    printed = capsys.readouterr().out
    for kind, record in RECORDS.items():
        assert json.JSONDecoder().raw_decode(printed.partition(f"{kind}:\n")[2])[0] == record


def test_each_sample_file_has_a_row_with_all_its_records(tokenizer, root):
    rows = {row[0]: row for row in formats.sample_rows(tokenizer)}
    lines = (root / "samples" / "alpaca.jsonl").read_text(encoding="utf-8").splitlines()
    assert rows["samples/alpaca.jsonl"][1:3] == ["alpaca", str(len(lines))]
    assert {name.split(".")[0]: rows[f"samples/{name}"][1] for name in formats.SAMPLES} == {
        name: name for name in ("alpaca", "sharegpt", "messages", "completion", "instruction")
    }
