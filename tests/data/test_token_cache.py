"""Tokens on disk: complete or absent, and found again only for the same text and tokenizer."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from qlora_kit.data import token_cache
from qlora_kit.data.token_cache import DamagedTokens, read_tokens, write_tokens
from qlora_kit.errors import UserError


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


def test_damaged_tokens_are_made_anew(stream_of):
    """A power failure may leave zeros in place of tokens; they would be trained on."""
    stream = stream_of(["a text whose tokens are lost"]).tolist()  # a copy: the array is mapped from the file
    for file in token_cache.find_cache_folder().glob("*/ids.bin"):
        if file.read_bytes() == np.array(stream, dtype=np.int32).tobytes():
            file.write_bytes(bytes(file.stat().st_size))
    assert stream_of(["a text whose tokens are lost"]).tolist() == stream


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


def test_a_cache_that_cannot_be_written_is_one_problem(stream_of, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"HF_DATASETS_CACHE: .*file.qlora_kit: cannot be written"):
        stream_of(["text"])
