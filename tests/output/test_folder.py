"""The output folder: disk space, and atomic writes."""

import os
import shutil

import pytest
from safetensors import SafetensorError

from qlora_kit.errors import Failed, UserError
from qlora_kit.output.folder import check_disk, existing_parent, replace_text, report_disk_errors, staged_folder


def test_a_run_without_space_for_a_checkpoint_and_the_adapter_is_refused(tmp_path, monkeypatch):
    """29,933,568 parameters x (4 + 4 + 2 bytes of moments), 1 MiB of extras and 16 MiB of tokenizer files: 302.5 MiB."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 200 * 2**20))
    with pytest.raises(
        UserError,
        match=r"training\.output_dir: .*new: needs 302 MiB, .* 200 MiB free. Free 102 MiB there, or set training.output_dir",
    ):
        check_disk(tmp_path / "new", 29_933_568, 2.0)
    check_disk(tmp_path / "new", 10_000_000, 2.0)


@pytest.mark.parametrize("path", ["there", "there/not yet/at all", "there/file/below"])
def test_the_existing_parent_is_the_nearest_ancestor_that_exists(tmp_path, path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    nearest = "there/file" if "file" in path else "there"
    assert existing_parent(tmp_path / path) == tmp_path / nearest


def write(tmp_path, text: str, aside: str | None = "aside") -> None:
    """Write a folder with a file in a folder."""
    place, staging = tmp_path / "place", tmp_path / "staging" / "place"
    with staged_folder(place, staging, tmp_path / aside if aside else None) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(text)


def read(tmp_path) -> str:
    return (tmp_path / "place" / "inner" / "file").read_text()


def test_a_staged_folder_replaces_the_one_before_it(tmp_path):
    for text in ("old", "new"):
        write(tmp_path, text)
        assert read(tmp_path) == text
    assert not any((tmp_path / "staging").iterdir()) and not (tmp_path / "aside").exists()


def test_without_a_place_aside_the_folder_that_was_first_stays(tmp_path):
    write(tmp_path, "first", aside=None)
    write(tmp_path, "second", aside=None)
    assert read(tmp_path) == "first" and not any((tmp_path / "staging").iterdir())


def test_a_failed_rename_puts_the_replaced_folder_back(tmp_path, monkeypatch):
    write(tmp_path, "old")
    rename = os.rename

    def fail(source, target):
        if source == tmp_path / "staging" / "place":
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no"):
        write(tmp_path, "new")
    assert read(tmp_path) == "old" and not any((tmp_path / "staging").iterdir()) and not (tmp_path / "aside").exists()


def test_a_failed_block_leaves_nothing_but_the_folder_before_it(tmp_path):
    write(tmp_path, "old")
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "place", tmp_path / "staging" / "place") as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert read(tmp_path) == "old" and not any((tmp_path / "staging").iterdir())


@pytest.mark.parametrize("error, reason", [
    (OSError(28, "No space left on device"), "No space left on device"),
    (Exception("x (os error 28)"), "No space left on device"),
    (SafetensorError("half"), "the disk accepted only a part of it"),
])  # fmt: skip
def test_every_library_s_word_for_a_full_disk_is_one_line(tmp_path, error, reason):
    with pytest.raises(Failed) as failure, report_disk_errors("the adapter", tmp_path, 0, "resume"):
        raise error
    assert str(failure.value) == f"the adapter cannot be written to {tmp_path} ({reason}); resume"
    with pytest.raises(ValueError, match="ours"), report_disk_errors("the adapter", tmp_path, 0):
        raise ValueError("ours")


def test_no_link_is_followed_where_a_text_is_written(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".run.json").symlink_to(tmp_path / "precious")
    replace_text(tmp_path / "run.json", "new")
    assert (tmp_path / "precious").read_text() == "kept" and (tmp_path / "run.json").read_text() == "new"
