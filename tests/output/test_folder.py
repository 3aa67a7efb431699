"""The output folder: whether a run may write there, disk space, and atomic writes."""

import os
import shutil

import pytest

from qlora_kit.errors import UserError
from qlora_kit.output.folder import check_disk, check_output_dir, existing_parent, staged_folder


def finish(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").touch()


def test_a_new_folder_is_accepted_and_not_yet_created(tmp_path):
    folder = tmp_path / "runs" / "one"
    assert check_output_dir(str(folder), overwrite=False, resume=False) == folder
    assert not folder.parent.exists()


def test_a_folder_with_other_files_is_accepted(tmp_path):
    (tmp_path / "notes.txt").touch()
    check_output_dir(str(tmp_path), overwrite=False, resume=False)


@pytest.mark.parametrize(
    ("prepare", "state"),
    [(finish, "finished"), (lambda folder: (folder / "checkpoints" / "checkpoint-5").mkdir(parents=True), "unfinished")],
)
def test_an_earlier_run_is_neither_replaced_nor_continued_without_a_flag(tmp_path, prepare, state):
    prepare(tmp_path)
    with pytest.raises(UserError, match=rf"\b{state} .*--resume.*--overwrite.*--output_dir"):
        check_output_dir(str(tmp_path), overwrite=False, resume=False)
    check_output_dir(str(tmp_path), overwrite=True, resume=False)
    check_output_dir(str(tmp_path), overwrite=False, resume=True)
    assert any(tmp_path.iterdir())  # the check removes nothing


@pytest.mark.parametrize("below", ["", "runs/one"])
def test_a_file_in_place_of_a_folder_is_named(tmp_path, below):
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match="taken is a file, not a folder"):
        check_output_dir(str(tmp_path / "taken" / below), overwrite=True, resume=False)


def test_a_folder_whose_nearest_existing_parent_cannot_be_written_is_refused(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr("os.access", lambda path, mode: checked.append(path))  # root may write anywhere
    with pytest.raises(UserError, match=r"cannot be written\. Change .*--output_dir"):
        check_output_dir(str(tmp_path / "runs" / "one"), overwrite=False, resume=False)
    assert checked == [tmp_path]


def test_a_folder_whose_only_checkpoint_was_being_replaced_holds_an_unfinished_run(tmp_path):
    (tmp_path / "checkpoints" / ".replaced" / "checkpoint-4").mkdir(parents=True)
    with pytest.raises(UserError, match="an unfinished run"):
        check_output_dir(str(tmp_path), overwrite=False, resume=False)


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
