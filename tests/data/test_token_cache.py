"""Tokens on disk: complete or absent, and found again only for the same text and tokenizer."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from qlora_kit.data import token_cache
from qlora_kit.data.dataset import tokenize_documents
from qlora_kit.data.notes import describe_notes
from qlora_kit.data.token_cache import DamagedTokens, read_tokens, write_tokens
from qlora_kit.errors import UserError
from tests.data.builders import as_jsonl, source_of


def test_tokens_are_read_as_they_were_written(tmp_path):
    with write_tokens(tmp_path / "key") as writer:
        writer.append(np.array([5, 6], dtype=np.int32), np.array([False, True]))
        writer.end_document()
        writer.append(np.array([7], dtype=np.int32), np.array([True]))
        writer.end_document()
        writer.about = {"formats": ["alpaca"]}
    stored = read_tokens(tmp_path / "key")
    assert (stored.ids.tolist(), stored.trained.tolist(), stored.ends.tolist()) == ([5, 6, 7], [False, True, True], [2, 3])
    assert (len(stored), stored.about) == (2, {"formats": ["alpaca"]})


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), write_tokens(tmp_path / "key") as writer:
        writer.append(np.arange(3, dtype=np.int32))
        raise RuntimeError
    assert read_tokens(tmp_path / "key") is None and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["ids.bin", "ends.bin", "trained.bin", "about.json"])
@pytest.mark.parametrize("damage", ["cut", "zeros", "gone", "longer"])
def test_damaged_tokens_are_not_read(tmp_path, name, damage):
    with write_tokens(tmp_path / "key") as writer:
        writer.append(np.array([5, 6, 7], dtype=np.int32), np.array([False, True, True]))
        writer.end_document()
    file = tmp_path / "key" / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": content[:-1], "zeros": bytes(len(content)), "longer": content + b"1"}[damage])
    with pytest.raises(DamagedTokens, match=r"about.json|ids|ends|trained"):
        read_tokens(tmp_path / "key")


def test_damaged_tokens_are_made_anew_and_that_is_said_once(write, tokenizer):
    """A power failure may leave zeros in place of tokens; they would be trained on."""
    source = source_of(write("documents.jsonl", as_jsonl({"text": "a text whose tokens are lost"})))

    def tokens():
        return tokenize_documents(source, source.documents, tokenizer)

    ids = tokens().ids.tolist()  # a copy: the array is mapped from the file
    for file in token_cache.find_cache_folder().glob("*/ids.bin"):
        if file.read_bytes() == np.array(ids, dtype=np.int32).tobytes():
            file.write_bytes(bytes(file.stat().st_size))
    again = tokens()
    assert again.ids.tolist() == ids
    reason = "was damaged, so the data were tokenized anew (ids.bin is not as it was written)"
    assert describe_notes(again.about) == [("cache", reason)] and describe_notes(tokens().about) == []


@pytest.mark.parametrize("place", ["file", "file/x", "/proc/x", "n" * 300, "~nosuchuser/x", "loop"])
def test_a_cache_folder_that_cannot_be_used_is_one_line(tmp_path, stream_of, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "qlora_kit").touch()
    (tmp_path / "file" / "x").touch()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setenv("HF_DATASETS_CACHE", place)
    if place.startswith("~"):
        assert str(token_cache.find_cache_folder()) == f"{place}/qlora_kit"
        return
    with pytest.raises(UserError, match=r"^HF_DATASETS_CACHE: .*/?qlora_kit: cannot be used for the cache of tokens \("):
        stream_of([f"a text for {place}"])


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path):
    left = tmp_path / ".writing-dead"
    left.mkdir()
    with write_tokens(tmp_path / "one"):
        assert not left.exists()
        with write_tokens(tmp_path / "two"):
            assert len(list(tmp_path.glob(".writing-*"))) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_the_second_time_tokens_come_from_the_cache(stream_of, monkeypatch):
    stream = stream_of(["a text that no other test has"])
    monkeypatch.setattr("qlora_kit.data.dataset.encode_documents", None)  # would fail when called
    assert stream_of(["a text that no other test has"]).tolist() == stream.tolist()


def test_a_run_that_fails_leaves_nothing_in_the_cache(stream_of, monkeypatch):
    def failing(*arguments):
        yield np.arange(3, dtype=np.int32), True
        raise RuntimeError

    with monkeypatch.context() as patched:
        patched.setattr("qlora_kit.data.dataset.encode_documents", failing)
        with pytest.raises(RuntimeError):
            stream_of(["a text that was interrupted"])
    assert stream_of(["a text that was interrupted"]).tolist() != [0, 1, 2]


def test_the_borders_of_documents_are_part_of_the_key(stream_of):
    assert stream_of(["ab", "c"]).tolist() != stream_of(["a", "bc"]).tolist()


def test_the_tokenizer_is_part_of_the_key(stream_of, tiny_dir):
    other = AutoTokenizer.from_pretrained(tiny_dir)
    other.add_tokens(["tides"])
    assert stream_of(["tides"]).tolist() != stream_of(["tides"], other).tolist()
    assert len(stream_of(["tides"], other)) == 2
