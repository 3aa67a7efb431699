"""Data settings -> blocks: documents with separators, records packed whole, shares held out, errors with their line."""

import os
import subprocess
import sys

import numpy as np
import pytest

from qlora_kit.config_file import load_config
from qlora_kit.data.dataset import load_blocks
from qlora_kit.errors import UserError
from qlora_kit.model.tokenizer import separator_id
from tests.data.builders import as_jsonl
from tests.data.made_tokenizers import make_tokenizer


def expected_stream(documents: list[str], tokenizer) -> list[int]:
    """Each document tokenized on its own, as a whole, with the tokens that begin a text."""
    separator = separator_id(tokenizer)
    tokenized = tokenizer(documents, verbose=False)["input_ids"]
    return [token for ids in tokenized for token in [*ids, separator]]


@pytest.mark.parametrize("name", ["tiny", "zephyr", "llama 3"])
def test_the_stream_is_each_document_followed_by_the_separator(name, stream_of):
    tokenizer = make_tokenizer(name)
    documents = [
        f"Document {number}: " + "the sea rises and falls. " * (number % 5) for number in range(1500)
    ]  # more than one batch
    stream = stream_of(documents, tokenizer)
    assert stream.dtype == np.int32 and stream.ndim == 1
    assert stream.tolist() == expected_stream(documents, tokenizer)


def test_documents_of_equal_length_make_a_flat_stream_too(tokenizer, stream_of):
    assert stream_of(["sea"] * 3).tolist() == 3 * [*tokenizer.encode("sea"), separator_id(tokenizer)]


@pytest.mark.parametrize(
    "document",
    [
        "sea " * 50_000,
        "The sea rises.\n\nIt falls.\n  indented\r\n" * 5_000,
        "Ünïcödé 你好 🙂 " * 20_000,
        "a" * 70_000 + " " + "b" * 70_000,  # no place to cut for a long stretch
        " \n" * 100_000 + "x",
    ],
    ids=["one line", "lines", "unicode", "long words", "blanks"],
)
def test_a_long_document_has_the_tokens_of_the_whole(tokenizer, stream_of, document):
    """It is longer than a stretch, and than the model's context."""
    assert stream_of([document]).tolist() == expected_stream([document], tokenizer)


@pytest.mark.slow
def test_a_large_file_takes_no_more_memory_than_a_small_one(root, tmp_path):
    """15 MB in one document: its text and tokens would take half a GB at once. Long words are tokenized fast."""
    path = tmp_path / "large.txt"
    path.write_text("".join(f"{number}\n" + f"{'x' * 119}\n" * 500 for number in range(250)))
    code = (
        "import resource, sys; from pathlib import Path; from qlora_kit.config_file import load_config; "
        "from qlora_kit.data.dataset import load_blocks; from qlora_kit.model.tokenizer import load_tokenizer; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024; "
        "config = load_config(Path('configs/tiny.yaml'), {'data.dataset': sys.argv[1], 'data.eval_split': None}); "
        "tokenizer = load_tokenizer(config.model); before = peak(); blocks, _ = load_blocks(config, tokenizer); "
        "print(len(blocks), peak() - before)"
    )
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, env=environment, capture_output=True, text=True)
    blocks, more_mib = map(int, done.stdout.split())
    assert blocks > 12_500
    assert more_mib < 60


# Records

TURNS = [("Hi", "Hello!"), ("2 + 2?", "4"), ("Bye", "See you."), ("Who?", "Me.")]
RECORDS = [{"prompt": prompt, "completion": completion} for prompt, completion in TURNS] * 5


@pytest.fixture
def blocks_of_file(root, write, tokenizer, monkeypatch):
    """Return a function that gives the training and evaluation blocks, of 32 tokens, of a file of records."""
    monkeypatch.chdir(root)

    def blocks_of_file(records: list[dict], **changes):
        path = write("records.jsonl", as_jsonl(*records))
        overrides = {"data.dataset": str(path), "data.eval_split": None, "data.max_length": 32}
        changes = {f"data.{key}": value for key, value in changes.items()}
        return load_blocks(load_config(root / "configs" / "tiny.yaml", overrides | changes), tokenizer)

    return blocks_of_file


def records_in(blocks, tokenizer) -> list[str]:
    """The records in blocks, told apart by `starts` alone; without packing each block is one record, and padding."""
    found = []
    for index in range(len(blocks)):
        block = blocks[index]
        starts = block.get("starts", (block["input_ids"] == tokenizer.pad_token_id).long())
        for start in starts.unique().tolist():
            found.append(tokenizer.decode(block["input_ids"][starts == start]))
    return [text for text in found if not text.startswith("<|endoftext|>")]  # padding


def chatml(prompt: str, completion: str) -> str:
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{completion}<|im_end|>\n"


def test_records_are_packed_whole_each_under_its_own_start(blocks_of_file, tokenizer):
    train, evaluation = blocks_of_file(RECORDS, max_length=64)
    assert evaluation is None and len(train) < len(RECORDS)
    assert sorted(records_in(train, tokenizer)) == sorted(chatml(*turn) for turn in TURNS * 5)


@pytest.mark.parametrize("packing", [True, False])
def test_a_share_of_whole_records_is_held_out_by_seed(blocks_of_file, tokenizer, packing):
    train, evaluation = blocks_of_file(RECORDS, eval_split=0.25, packing=packing)
    assert (train.documents, evaluation.documents) == (15, 5)
    found = records_in(train, tokenizer) + records_in(evaluation, tokenizer)
    assert sorted(found) == sorted(chatml(*turn) for turn in TURNS * 5)
    assert packing or (len(train), len(evaluation)) == (15, 5)


def test_a_share_of_one_record_is_one_problem(blocks_of_file):
    with pytest.raises(UserError, match=r"data\.eval_split: 0\.25: is a share of a single record"):
        blocks_of_file(RECORDS[:1], eval_split=0.25)


def test_evaluation_may_be_a_file_of_its_own(blocks_of_file, root):
    train, evaluation = blocks_of_file(RECORDS, eval_split=str(root / "samples" / "messages.jsonl"), max_length=128)
    assert (train.join_rule, evaluation.join_rule) == ("completion records, answers trained", "messages records, answers trained")


def test_the_second_time_records_come_from_the_cache_and_another_setting_does_not(blocks_of_file, monkeypatch):
    first, _ = blocks_of_file(RECORDS)
    monkeypatch.setattr("qlora_kit.data.dataset._prepare_records", None)  # would fail when called
    assert blocks_of_file(RECORDS)[0].fingerprint() == first.fingerprint()
    assert blocks_of_file(RECORDS, max_length=64, packing=False)[0].documents == 20  # of the same tokens
    for changed in ({"train_on": "all"}, {"format": "alpaca"}):
        with pytest.raises((TypeError, UserError)):
            blocks_of_file(RECORDS, **changed)


def test_the_chat_template_is_part_of_the_cache_key(blocks_of_file, tokenizer, monkeypatch):
    first, _ = blocks_of_file(RECORDS)
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template.replace("'\\n' + message", "'\\n\\n' + message"))
    assert blocks_of_file(RECORDS)[0].fingerprint() != first.fingerprint()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "Hi"}, "the keys are prompt, expected messages"),
        ({"prompt": "Hi", "completion": None}, "completion holds NoneType, expected text"),
        ({"prompt": "Hi", "completion": " "}, "an answer is empty, expected text to train on"),
        (
            {"messages": [{"role": "user", "content": "Hi"}]},
            "the format is messages and that of the records before it completion",
        ),
    ],
)
def test_a_wrong_record_is_one_problem_with_file_and_line(blocks_of_file, record, reason):
    with pytest.raises(UserError) as caught:
        blocks_of_file([*RECORDS, record])
    (problem,) = caught.value.lines
    assert "\n" not in problem and "records.jsonl: line 21: " + reason in problem


def test_turns_out_of_order_are_one_problem(blocks_of_file):
    turns = [{"role": role, "content": "x"} for role in ("user", "user", "assistant")]
    with pytest.raises(UserError, match=r"records\.jsonl: line 1: turn 2 is user, expected assistant"):
        blocks_of_file([{"messages": turns}])


def test_a_record_that_trains_on_nothing_is_one_problem(blocks_of_file):
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]
    with pytest.raises(UserError, match=r"records\.jsonl: line 1: no token is trained, expected an answer"):
        blocks_of_file([{"messages": turns}])
