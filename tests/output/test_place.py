"""Which folder may become a run's; what the check creates, it removes."""

import re

import pytest

from qlora_kit.errors import UserError
from qlora_kit.output.place import check_output_dir
from tests.tiny_run import names


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
    [
        (finish, "finished adapter"),
        (lambda folder: (folder / "checkpoints" / "checkpoint-5").mkdir(parents=True), "unfinished run"),
    ],
)
def test_an_earlier_run_is_neither_replaced_nor_continued_without_a_flag(tmp_path, prepare, state):
    prepare(tmp_path)
    with pytest.raises(UserError, match=rf"\b{state}\b.*--resume.*--overwrite.*--output_dir"):
        check_output_dir(str(tmp_path), overwrite=False, resume=False)
    check_output_dir(str(tmp_path), overwrite=True, resume=False)
    check_output_dir(str(tmp_path), overwrite=False, resume=True)
    assert any(tmp_path.iterdir())  # the check removes nothing


@pytest.mark.parametrize("below", ["", "runs/one"])
def test_a_file_in_place_of_a_folder_is_named(tmp_path, below):
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"taken:? is a file, not a folder"):
        check_output_dir(str(tmp_path / "taken" / below), overwrite=True, resume=False)


def test_a_folder_whose_nearest_existing_parent_cannot_be_written_is_refused(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr("os.access", lambda path, mode: checked.append(path))  # root may write anywhere
    with pytest.raises(UserError, match=r"cannot be written\. Change .*--output_dir"):
        check_output_dir(str(tmp_path / "runs" / "one"), overwrite=False, resume=False)
    assert checked[:1] == [tmp_path]


def test_a_folder_whose_only_checkpoint_was_being_replaced_holds_an_unfinished_run(tmp_path):
    (tmp_path / "checkpoints" / ".replaced" / "checkpoint-4").mkdir(parents=True)
    with pytest.raises(UserError, match="an unfinished run"):
        check_output_dir(str(tmp_path), overwrite=False, resume=False)


def refusal(name, *inputs: str, overwrite: bool = True) -> str:
    with pytest.raises(UserError) as refused:
        check_output_dir(str(name), overwrite, False, inputs)
    (line,) = refused.value.lines
    assert line.startswith("training.output_dir: ")
    return line


@pytest.fixture
def home(tmp_path):
    """A folder with a base model, data, and a run, and links."""
    for name in ("model", "data/deep", "run/checkpoints/checkpoint-1", "empty"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("model/config.json", "model/model.safetensors", "data/a.txt", "run/checkpoints/checkpoint-1/manifest.json"):
        (tmp_path / name).touch()
    (tmp_path / "to model").symlink_to(tmp_path / "model")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return tmp_path


@pytest.mark.parametrize("name, words", [
    ("model", "holds a whole model"), ("to model", "holds a whole model"), ("model/out", "lies in .*model, which the run reads"),
    ("data", "is or lies in .*data, which"), ("data/deep/out", "is or lies in .*data, which"),
    ("run/checkpoints", "lies in .*checkpoints, which holds checkpoints"),
    ("run/checkpoints/checkpoint-1/x", "lies in .*checkpoint"),
    ("run/.new", "lies in .*, which holds checkpoints"), ("nowhere", "a link that leads nowhere"),
    ("nowhere/x", "a link that leads nowhere"), ("loop", "Too many levels"), ("a" * 256, "File name too long"),
    ("missing/" + "a" * 300 + "/b", "File name too long"), ("a\0b", "null (byte|character)"),
], ids=lambda value: value[:20])  # fmt: skip
def test_a_place_that_is_no_place_for_a_run_is_refused(home, name, words):
    before = sorted(home.rglob("*"))
    line = refusal(home / name, str(home / "model"), str(home / "data"))
    assert re.search(words, line), line
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize("name", ["/", "/..", "~nosuchuser/x", "/proc/x/y", "/dev/null/x"])
def test_places_of_the_system_are_refused(name):
    refusal(name)


def test_a_file_of_data_may_lie_beside_the_output_but_not_be_replaced_by_it(home):
    data = home / "empty" / "articles.txt"
    data.touch()
    assert check_output_dir(str(home / "empty"), False, False, [str(data)]) == home / "empty"
    for name in ("metrics.jsonl", "checkpoints/data.txt"):
        assert "would replace" in refusal(home / "empty", str(home / "empty" / name))


def test_entries_that_a_run_cannot_replace_are_named(home):
    (home / "empty" / "run.json").mkdir()
    assert "holds a folder where the file run.json is to be" in refusal(home / "empty")
    (home / "run" / "checkpoints").rename(home / "elsewhere")
    (home / "run" / "checkpoints").symlink_to(home / "elsewhere")
    assert "behind a link" in refusal(home / "run")
    check_output_dir(str(home / "run"), overwrite=False, resume=True)  # which follows it
    (home / "run" / "checkpoints").unlink()
    (home / "run" / "checkpoints").touch()
    assert "something else where the folder checkpoints" in refusal(home / "run")


def test_a_run_that_died_early_keeps_its_log_and_a_new_one_beside_an_old_one_is_named(tmp_path):
    (tmp_path / "training_log.txt").touch()
    line = refusal(tmp_path, overwrite=False)
    assert "a run that ended before its first checkpoint. Replace it with --overwrite, or" in line and "--resume" not in line
    finish(tmp_path)
    (tmp_path / ".new").mkdir()
    (tmp_path / ".new" / "training_log.txt").touch()
    line = refusal(tmp_path, overwrite=False)
    assert "in .new the unfinished one that replaces it. Continue that with --resume, start it anew with --overwrite" in line


def test_what_was_made_to_try_a_folder_is_removed(tmp_path):
    check_output_dir(str(tmp_path / "a" / "b"), overwrite=False, resume=False)
    assert names(tmp_path) == []
