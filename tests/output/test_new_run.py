"""A new run takes the place of an old one whole or not at all, whenever it is killed."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from qlora_kit.errors import UserError
from qlora_kit.output import new_run
from qlora_kit.output.lock import OutputLock
from qlora_kit.output.new_run import choose_folder, finish, finish_for_reader, is_whole, move_in, staging
from qlora_kit.output.provenance import write_provenance
from tests.tiny_run import names


class Killed(BaseException):
    pass


def write_run(folder: Path, text: str) -> None:
    """Write what a run has while it trains."""
    (folder / "checkpoints" / f"checkpoint-{text}").mkdir(parents=True)
    for name in ("training_log.txt", "metrics.jsonl", "config.yaml"):
        (folder / name).write_text(text)


def write_result(folder: Path, text: str) -> None:
    with staging(folder) as new:
        (new / "adapter_config.json").write_text(text)
        (new / "adapter_model.safetensors").write_text(text)
        (new / "tokenizer.json").write_text(text)
        (new / "templates").mkdir()
        (new / "templates" / "one").write_text(text)
        write_provenance(new, {"run": text})


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def old(tmp_path):
    """The folder of a finished run."""
    folder = tmp_path / "out"
    write_run(folder, "old")
    write_result(folder, "old")
    move_in(folder)
    (folder / "training_curves.png").write_text("old")
    (folder / "chat_template.jinja").write_text("old")
    (folder / "notes.txt").write_text("mine")
    return folder


def run_of(folder: Path) -> str:
    """Return which run the adapter and run.json are of."""
    run = json.loads((folder / "run.json").read_text())
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert run["adapter_sha256"] == hashlib.sha256(weights).hexdigest() and run["run"] == weights.decode()
    return run["run"]


def test_what_the_new_run_does_not_have_is_not_inherited(old):
    write_run(old / ".new", "new")
    write_result(old, "new")
    move_in(old)
    found = content(old)
    assert found.pop("notes.txt") == "mine" and "run.json" in found
    assert {text for name, text in found.items() if name != "run.json"} == {"new"}
    assert (
        "training_curves.png" not in found
        and "chat_template.jinja" not in found
        and names(old / "checkpoints") == ["checkpoint-new"]
    )


@pytest.mark.parametrize("replaces", [True, False], ids=["--overwrite", "longer"])
def test_a_kill_before_any_change_leaves_one_run_whole(old, monkeypatch, replaces, tmp_path):
    """The next command sees the old run, or the new one."""
    for count in range(60):
        folder = tmp_path / str(count)
        shutil.copytree(old, folder)
        if replaces:
            write_run(folder / ".new", "new")
        left = [count]

        def count_down(call, left=left):
            def counting(*arguments, **named):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return call(*arguments, **named)

            return counting

        with monkeypatch.context() as patch:
            for module, name in ((os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (os, "fsync")):
                patch.setattr(module, name, count_down(getattr(module, name)))
            patch.setattr(new_run, "_drop_staged", lambda new: False)  # a killed process drops nothing
            try:
                write_result(folder, "new")
                move_in(folder)
                is_killed = False
            except Killed:
                is_killed = True
        if is_killed and not is_whole(folder):
            assert run_of(folder) in ("old", "new")
        finish_for_reader(folder, "--adapter")
        seen = run_of(folder)
        lines = finish(folder)
        assert run_of(folder) == seen and len(lines) < 2
        if seen == "new":
            assert names(folder / "checkpoints") == ["checkpoint-new" if replaces else "checkpoint-old"]
            assert content(folder)["templates/one"] == "new" and ".new" not in names(folder)
        elif replaces:
            assert choose_folder(folder, True, False) == folder / ".new" and names(folder / ".new" / "checkpoints")
        if not is_killed:
            assert seen == "new"
            return
    pytest.fail("never ended")


def test_a_reader_waits_for_a_run_that_is_moving_and_says_when_it_cannot_finish(old, monkeypatch):
    monkeypatch.setattr(new_run, "PATIENCE", 0.2)
    write_result(old, "new")
    with (
        OutputLock(old),
        pytest.raises(UserError, match=r"^--adapter: .*out: holds in \.new a finished adapter .*\. Read it once"),
    ):
        finish_for_reader(old, "--adapter")
    assert run_of(old) == "old"
    (line,) = finish_for_reader(old, "--adapter")
    assert "Moved the finished adapter of a killed run" in line and run_of(old) == "new" and finish_for_reader(old, "x") == []


def test_what_killed_runs_left_is_removed_and_named_in_one_line(old):
    for name in (".saving_abc", ".new", "checkpoints/.saving/checkpoint-1"):
        (old / name).mkdir(parents=True)
    (old / ".metrics.jsonl").touch()
    (line,) = finish(old)
    assert all(name in line for name in (".saving_abc", ".new", "checkpoints/.saving", ".metrics.jsonl")) and finish(old) == []
    (old / ".new").symlink_to(old.parent)
    assert len(finish(old)) == 1 and old.parent.is_dir() and ".new" not in names(old)


@pytest.mark.parametrize("text", ["", "[]", "[" * 10**5, '{"adapter_sha256": 5}', "{}"])
def test_a_staged_run_json_that_no_run_has_written_moves_nothing(old, text):
    (old / ".new").mkdir()
    (old / ".new" / "run.json").write_text(text)
    assert finish_for_reader(old, "--adapter") == [] and run_of(old) == "old"


@pytest.mark.parametrize("resume, overwrite, begun, place", [
    (False, False, False, "out"), (True, False, False, "out"), (False, True, False, ".new"), (True, True, False, "out"),
    (True, False, True, ".new"), (False, True, True, ".new"),
])  # fmt: skip
def test_only_a_run_that_replaces_another_one_writes_beside_it(old, resume, overwrite, begun, place):
    if begun:
        write_run(old / ".new", "new")
    assert choose_folder(old, resume, overwrite).name == place


def test_a_fresh_run_writes_into_its_folder(tmp_path):
    assert choose_folder(tmp_path / "none", False, True) == tmp_path / "none"
    (tmp_path / "notes.txt").touch()
    assert choose_folder(tmp_path, False, True) == tmp_path
