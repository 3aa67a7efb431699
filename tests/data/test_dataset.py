"""A source -> tokens on disk -> blocks: nothing is lost but the tail, and every token of running text is a label."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_kit.config import DataSettings
from qlora_kit.config_file import load_config
from qlora_kit.data.blocks import TextBlocks, cut_into_blocks
from qlora_kit.data.dataset import load_blocks, tokenize_documents
from qlora_kit.data.documents import hold_out
from qlora_kit.data.source import open_source
from qlora_kit.errors import UserError
from qlora_kit.model.tokenizer import separator_id
from tests.written_out import joined


@pytest.fixture(scope="module")
def tokenizer(tiny_dir):
    return AutoTokenizer.from_pretrained(tiny_dir)


@pytest.fixture
def tokenized(tmp_path, tokenizer):
    """tokenized(documents) -> the ids of their stream, through a file of records."""

    def tokenized(documents: list[str], tokenizer=tokenizer) -> np.ndarray:
        path = tmp_path / "documents.jsonl"
        path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        source = open_source(DataSettings(dataset=str(path), subset=None), [str(path)], "train", "data.dataset")
        return tokenize_documents(source, source.documents, tokenizer).ids

    return tokenized


def blocks_of(stream, length: int) -> TextBlocks:
    return cut_into_blocks(np.asarray(stream, dtype=np.int32), length, 1, "one document a row", "data.dataset")


def test_a_block_names_itself_and_its_documents():
    """Documents of 3, 9, 4 and 2 tokens in blocks of 4: the second block lies within document 2, the fourth holds 3 alone."""
    blocks = replace(blocks_of(range(18), 4), full_lengths=np.array([3, 9, 4, 2]))
    assert [blocks[number]["block"] for number in range(4)] == [0, 1, 2, 3]
    assert [blocks.sources(number) for number in range(4)] == [[1, 2], [2], [2], [3]]
    assert blocks_of(range(18), 4).sources(0) == []


# Tokens


def test_the_separator_ends_a_text_and_not_a_turn(tokenizer):
    assert tokenizer.eos_token == "<|im_end|>"  # Qwen's chat models: the wrong one
    assert tokenizer.decode([separator_id(tokenizer)]) == "<|endoftext|>"


def plain_tokenizer(**ends):
    """Llama's kind: no <|endoftext|> in the vocabulary; what is not in it has the id of unknown words."""
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **ends)


def test_without_endoftext_the_end_of_sequence_separates():
    assert separator_id(plain_tokenizer(eos_token="</s>")) == 2


def test_a_tokenizer_without_any_end_is_one_problem():
    with pytest.raises(UserError, match=r"model\.name: .*end-of-sequence"):
        separator_id(plain_tokenizer())


def stream_of(documents: list[str], tokenizer) -> list[int]:
    """Each document tokenized by itself, as a whole."""
    separator = separator_id(tokenizer)
    tokenized = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return [token for ids in tokenized for token in [*ids, separator]]


def test_the_stream_is_each_document_followed_by_the_separator(tokenizer, tokenized):
    documents = [
        f"Document {number}: " + "the sea rises and falls. " * (number % 5) for number in range(1500)
    ]  # over two batches
    stream = tokenized(documents)
    assert stream.dtype == np.int32 and stream.ndim == 1
    assert stream.tolist() == stream_of(documents, tokenizer)


def test_documents_of_equal_length_make_a_flat_stream_too(tokenizer, tokenized):
    assert tokenized(["sea"] * 3).tolist() == 3 * [*tokenizer.encode("sea"), separator_id(tokenizer)]


@pytest.mark.parametrize(
    "document",
    [
        "sea " * 50_000,
        "The sea rises.\n\nIt falls.\n  indented\r\n" * 5_000,
        "Ünïcödé 你好 🙂 " * 20_000,
        "a" * 70_000 + " " + "b" * 70_000,  # no place to cut for long
        " \n" * 100_000 + "x",
    ],
    ids=["one line", "lines", "unicode", "long words", "blanks"],
)
def test_a_long_document_has_the_tokens_of_the_whole(tokenizer, tokenized, document):
    """It is longer than what is tokenized at once, and than the model reads."""
    assert tokenized([document]).tolist() == stream_of([document], tokenizer)


def test_the_second_time_tokens_come_from_the_cache(tokenized, monkeypatch):
    stream = tokenized(["a text that no other test has"])
    monkeypatch.setattr("qlora_kit.data.dataset.encode_documents", None)  # would fail when called
    assert tokenized(["a text that no other test has"]).tolist() == stream.tolist()


def test_a_run_that_fails_leaves_nothing_in_the_cache(tokenized, monkeypatch):
    def failing(*arguments):
        yield np.arange(3, dtype=np.int32), True
        raise RuntimeError

    with monkeypatch.context() as patched:
        patched.setattr("qlora_kit.data.dataset.encode_documents", failing)
        with pytest.raises(RuntimeError):
            tokenized(["a text that was interrupted"])
    assert tokenized(["a text that was interrupted"]).tolist() != [0, 1, 2]


def test_the_cache_tells_documents_apart_by_their_borders(tokenized):
    assert tokenized(["ab", "c"]).tolist() != tokenized(["a", "bc"]).tolist()


def test_the_cache_tells_tokenizers_apart(tokenizer, tokenized, tiny_dir):
    other = AutoTokenizer.from_pretrained(tiny_dir)
    other.add_tokens(["tides"])
    assert tokenized(["tides"]).tolist() != tokenized(["tides"], other).tolist()
    assert len(tokenized(["tides"], other)) == 2


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


def test_a_cache_that_cannot_be_written_is_one_problem(tokenized, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"HF_DATASETS_CACHE: .*file.qlora_kit: cannot be written"):
        tokenized(["text"])


# Records

TURNS = [("Hi", "Hello!"), ("2 + 2?", "4"), ("Bye", "See you."), ("Who?", "Me.")]
RECORDS = [{"prompt": prompt, "completion": completion} for prompt, completion in TURNS] * 5


@pytest.fixture
def blocks_of_file(root, tmp_path, tokenizer, monkeypatch):
    """blocks_of_file(records, changes) -> training and evaluation blocks of a file of records, 32 tokens each."""
    monkeypatch.chdir(root)

    def blocks_of_file(records: list[dict], **changes):
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        overrides = {"data.dataset": str(path), "data.eval_split": None, "data.max_length": 32}
        changes = {f"data.{key}": value for key, value in changes.items()}
        return load_blocks(load_config(root / "configs" / "tiny.yaml", overrides | changes), tokenizer)

    return blocks_of_file


def rounds(blocks, tokenizer) -> list[str]:
    """The records that stand in blocks, told apart by `starts` alone; without packing each block is one, and padding."""
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
    assert sorted(rounds(train, tokenizer)) == sorted(chatml(*turn) for turn in TURNS * 5)


@pytest.mark.parametrize("packing", [True, False])
def test_a_share_of_whole_records_is_held_out_by_seed(blocks_of_file, tokenizer, packing):
    train, evaluation = blocks_of_file(RECORDS, eval_split=0.25, packing=packing)
    assert (train.documents, evaluation.documents) == (15, 5)
    assert sorted(rounds(train, tokenizer) + rounds(evaluation, tokenizer)) == sorted(chatml(*turn) for turn in TURNS * 5)
    assert packing or (len(train), len(evaluation)) == (15, 5)


def test_a_share_of_one_record_is_one_problem(blocks_of_file):
    with pytest.raises(UserError, match=r"data\.eval_split: 0\.25: is a share of a single record"):
        blocks_of_file(RECORDS[:1], eval_split=0.25)


def test_evaluation_may_be_a_file_of_its_own(blocks_of_file, root):
    train, evaluation = blocks_of_file(RECORDS, eval_split=str(root / "samples" / "messages.jsonl"), max_length=128)
    assert (train.join_rule, evaluation.join_rule) == ("completion records, answers trained", "messages records, answers trained")


def test_the_second_time_records_come_from_the_cache_and_another_setting_does_not(blocks_of_file, monkeypatch):
    first, _ = blocks_of_file(RECORDS)
    monkeypatch.setattr("qlora_kit.data.dataset.encode_records", None)  # would fail when called
    assert blocks_of_file(RECORDS)[0].fingerprint() == first.fingerprint()
    assert blocks_of_file(RECORDS, max_length=64, packing=False)[0].documents == 20  # of the same tokens
    for changed in ({"train_on": "all"}, {"format": "alpaca"}):
        with pytest.raises((TypeError, UserError)):
            blocks_of_file(RECORDS, **changed)


def test_the_cache_tells_chat_templates_apart(blocks_of_file, tokenizer, monkeypatch):
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


# TextBlocks


def test_blocks_and_tail_are_the_whole_stream():
    stream = list(range(23))
    blocks = blocks_of(stream, 8)
    assert torch.cat([blocks[index]["input_ids"] for index in range(len(blocks))]).tolist() == stream[:16]
    assert (len(blocks), blocks.tokens, blocks.tail_tokens) == (2, 16, 7)


def test_a_stream_that_fills_its_blocks_has_no_tail():
    blocks = blocks_of(range(16), 8)
    assert (len(blocks), blocks.tail_tokens) == (2, 0)


def test_a_stream_too_short_for_one_block_is_one_problem():
    with pytest.raises(UserError) as caught:
        blocks_of(range(9), 10)
    (problem,) = caught.value.lines
    assert problem.startswith("data.dataset: has 9 tokens") and "data.max_length 10" in problem and "--max_length 9" in problem


def test_every_token_is_a_label_at_its_own_position_and_so_is_the_separator(tokenizer, tokenized):
    blocks = blocks_of(tokenized(["The sea.", "Salt.", "The Moon rises."]), 8)
    separator = separator_id(tokenizer)
    assert separator == tokenizer.pad_token_id  # collators that mask padding by id would not train it
    separators = 0
    for index in range(len(blocks)):
        assert blocks[index]["labels"].tolist() == blocks[index]["input_ids"].tolist()
        assert blocks[index]["labels"].dtype == torch.int64
        separators += blocks[index]["labels"].tolist().count(separator)
    assert separators >= 1


def test_take_keeps_the_first_blocks_and_none_keeps_all():
    blocks = blocks_of(range(32), 8)
    assert blocks.take(2).ids.tolist() == blocks.ids[:2].tolist()
    assert len(blocks.take(None)) == len(blocks.take(100)) == 4


def test_fingerprint_changes_with_the_data_and_with_nothing_else():
    first, same, other = blocks_of(range(16), 8), blocks_of(range(17), 8), blocks_of([*range(15), 99], 8)
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()


# Held-out share


def held(documents: list[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    train, held_out = hold_out(lambda: ((document, True) for document in documents), fraction, seed)
    return joined(train()), joined(held_out())


DOCUMENTS = [f"document {number}" for number in range(40)]


def test_held_out_documents_are_disjoint_complete_and_in_order():
    train, held_out = held(DOCUMENTS, 0.25, seed=1)
    assert (len(train), len(held_out)) == (30, 10)
    assert sorted(train + held_out) == sorted(DOCUMENTS)
    assert train == [document for document in DOCUMENTS if document in train]
    assert held_out == [document for document in DOCUMENTS if document in held_out]


def test_the_seed_decides_what_is_held_out():
    assert held(DOCUMENTS, 0.25, seed=1) == held(DOCUMENTS, 0.25, seed=1)
    assert held(DOCUMENTS, 0.25, seed=1) != held(DOCUMENTS, 0.25, seed=2)


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("count", [10, 40])
def test_neither_part_is_ever_empty(count, fraction):
    train, held_out = held(DOCUMENTS[:count], fraction, seed=1)
    assert train and held_out


def test_one_long_document_is_cut_near_its_end_at_a_line():
    text = "".join(f"line {number}\n" for number in range(100))
    (train,), (held_out,) = held([text], 0.2, seed=1)
    assert train + held_out == text
    assert train.endswith("\n") and held_out.startswith("line ")
    assert len(held_out) == pytest.approx(0.2 * len(text), abs=len("line 99\n"))


def test_a_few_documents_are_cut_without_losing_text():
    (train,), (held_out,) = held(["one\n", "two\n", "three\n"], 0.3, seed=1)
    assert (train + held_out).split() == ["one", "two", "three"]


def test_a_document_without_line_ends_is_still_cut():
    assert held(["x" * 100], 0.1, seed=1) == (["x" * 90], ["x" * 10])
