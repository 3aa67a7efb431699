"""Checkpoints are complete or absent: damage, kills (real ones), full disks, and which ones are kept."""

import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_kit.errors import Failed
from qlora_kit.output.checkpoints import clean, find_newest_valid, list_checkpoints, rotate, staged_checkpoint
from tests.tiny_run import damage, names

EMPTY = hashlib.sha256().hexdigest()
FORK = multiprocessing.get_context("fork")


def write(root: Path, step: int, text: str = "weights", **run) -> Path:
    """Write a checkpoint of two small files and return its folder."""
    with staged_checkpoint(root, step, run, needed=0) as folder:
        (folder / "adapter.txt").write_text(f"{text} of step {step}")
        (folder / "optimizer.txt").write_text("moments")
    return root / f"checkpoint-{step}"


def test_a_manifest_holds_size_and_hash_of_every_file(tmp_path):
    folder = write(tmp_path, 3, eval_loss=1.5)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["number"], manifest["run"]) == (3, 1, {"eval_loss": 1.5})
    sums = subprocess.run(["sha256sum", "adapter.txt", "optimizer.txt"], cwd=folder, capture_output=True, text=True, check=True)
    for line in sums.stdout.splitlines():
        digest, name = line.split()
        assert manifest["files"][name] == {"bytes": (folder / name).stat().st_size, "sha256": digest}
    assert set(manifest["files"]) == {"adapter.txt", "optimizer.txt"}


def test_files_are_flushed_before_the_rename_and_their_folder_after_it(tmp_path, monkeypatch):
    """A test cannot cause a power failure; it checks the order of the calls that make a checkpoint survive one."""
    calls, fsync, rename = [], os.fsync, os.rename
    open_files = Path("/proc/self/fd")
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(os.readlink(open_files / str(handle))), fsync(handle)))
    monkeypatch.setattr(os, "rename", lambda *paths: (calls.append("rename"), rename(*paths)))
    write(tmp_path, 3)
    staging = f"{tmp_path}/.saving/checkpoint-3"
    files = [f"{staging}/adapter.txt", f"{staging}/manifest.json", f"{staging}/optimizer.txt"]
    assert calls == [*files, staging, "rename", str(tmp_path)]


@pytest.mark.parametrize("fault, reason", [
    (lambda folder: damage(folder, "adapter.txt"), r"adapter.txt was changed after it was written \(its SHA-256 differs\)"),
    (lambda folder: damage(folder, "manifest.json"), "manifest.json is damaged"),
    (lambda folder: os.truncate(folder / "adapter.txt", 5), "adapter.txt has 5 bytes instead of 17"),
    (lambda folder: os.truncate(folder / "manifest.json", 50), "manifest.json is damaged"),
    (lambda folder: os.truncate(folder / "manifest.json", 0), "manifest.json is damaged"),
    (lambda folder: (folder / "optimizer.txt").unlink(), "optimizer.txt is missing"),
    (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json, which is written last"),
    (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is damaged"),
])  # fmt: skip
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_found(tmp_path, fault, reason):
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    fault(newer)
    checkpoint, invalid = find_newest_valid(list_checkpoints(tmp_path))
    assert checkpoint.folder == older and (checkpoint.step, checkpoint.number) == (1, 1)
    ((folder, text),) = invalid
    assert folder == newer and re.fullmatch(reason, text), text
    assert newer.exists()  # until a newer valid one is written


def seal(folder: Path, **changed) -> None:
    """Change a manifest and give it its own digest again, as anyone can."""
    content = json.loads((folder / "manifest.json").read_text())
    content = {name: value for name, value in (content | changed).items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content | {"sha256": digest}))


@pytest.mark.parametrize("changed", [
    {"files": {}}, {"files": []}, {"files": {"a": 5}}, {"files": {"a": {"bytes": "1", "sha256": ""}}},
    {"step": "1"}, {"step": -1}, {"step": 10**30}, {"number": None}, {"number": True}, {"run": []}, {"run": {"eval_loss": "low"}},
    *({"files": {name: {"bytes": 0, "sha256": EMPTY}}} for name in (
        "/dev/zero", "../outside", "a/../../outside", "link", "folder/outside", "pipe", "folder", "\x1b[31m", "\ud800",
        "a" * 300, "")),
], ids=str)  # fmt: skip
def test_a_manifest_that_no_run_has_written_is_refused_and_nothing_outside_is_read(tmp_path, changed):
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    for place in (tmp_path / "outside", tmp_path / "elsewhere" / "outside"):
        place.parent.mkdir(exist_ok=True)
        place.touch()
    (newer / "link").symlink_to(tmp_path / "outside")
    (newer / "folder").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(newer / "pipe")
    seal(newer, **changed)
    checkpoint, ((folder, reason),) = find_newest_valid(list_checkpoints(tmp_path))
    assert checkpoint.folder == older and folder == newer and "\n" not in reason and "\x1b" not in reason
    rotate(tmp_path, 1)


@pytest.mark.parametrize(
    "content", [b"[" * 10**5, b'{"sha256": ' + b"9" * 5000 + b"}", b"\xff", b'{"a":' * 500 + b"1" + b"}" * 500]
)
def test_a_manifest_that_is_no_json_object_is_damaged(tmp_path, content):
    (write(tmp_path, 1) / "manifest.json").write_bytes(content)
    assert find_newest_valid(list_checkpoints(tmp_path)) == (None, [(tmp_path / "checkpoint-1", "manifest.json is damaged")])


@pytest.mark.parametrize("at", range(0, 10))
def test_a_flipped_bit_anywhere_in_a_manifest_is_found(tmp_path, at):
    folder = write(tmp_path, 1)
    content = bytearray((folder / "manifest.json").read_bytes())
    place = at * (len(content) - 1) // 10
    content[place] ^= 2
    (folder / "manifest.json").write_bytes(content)
    checkpoint, invalid = find_newest_valid([folder])
    # White space between words may change: the content stays the same.
    assert (checkpoint is None and len(invalid) == 1) or bytes(content[place : place + 1]).isspace()


def kill_at(count: int, root: Path, step: int) -> None:
    """Save a checkpoint, and die by SIGKILL instead of the `count`-th call that changes the disk; runs in a child process."""
    left = [count]

    def dying(call):
        def maybe(*arguments, **named):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return maybe

    os.fsync, os.rename, os.mkdir = dying(os.fsync), dying(os.rename), dying(os.mkdir)
    shutil.rmtree = dying(shutil.rmtree)
    write(root, step, "new")


def kill_a_save(root: Path, step: int, count: int) -> bool:
    """Return whether the child was killed: after the last call it has saved the checkpoint."""
    child = FORK.Process(target=kill_at, args=(count, root, step))
    child.start()
    child.join(20)
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


@pytest.mark.parametrize("step", [2, 1], ids=["new step", "replaces the only checkpoint"])
def test_a_kill_at_any_point_of_a_save_leaves_a_valid_checkpoint_and_no_leftovers(tmp_path, step):
    seen = set()
    for count in range(1, 30):
        root = tmp_path / str(count)
        write(root, 1)
        killed = kill_a_save(root, step, count)
        clean(root)
        checkpoint, invalid = find_newest_valid(list_checkpoints(root))
        text = (checkpoint.folder / "adapter.txt").read_text()
        assert text in ("weights of step 1", f"new of step {step}") and invalid == []
        assert all(name.startswith("checkpoint-") for name in names(root))
        seen.add(text)
        if not killed:
            assert text == f"new of step {step}"
            break
    assert count > 7 and len(seen) == 2  # all points were tried, before the rename and after it


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    write(tmp_path, 1)
    for name in (".saving/checkpoint-2", ".removed/checkpoint-1", ".replaced/checkpoint-1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "half").touch()
    clean(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]
    clean(tmp_path / "not there")


@pytest.mark.parametrize("limit, kept", [
    (None, [1, 2, 3, 4, 5]), (3, [2, 4, 5]), (2, [2, 5]), (1, [2, 5]),
])  # fmt: skip
def test_the_newest_and_the_best_are_kept(tmp_path, limit, kept):
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None)):
        write(tmp_path, step, eval_loss=loss)
    rotate(tmp_path, limit)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]


def test_the_protected_checkpoint_is_kept_although_another_one_is_better(tmp_path):
    for step, loss in ((1, 2.0), (9, 1.0), (2, 3.0)):
        write(tmp_path, step, eval_loss=loss)
    rotate(tmp_path, 2, tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-9"]


def test_an_invalid_checkpoint_is_deleted_once_a_newer_one_is_written(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoint-2" / "manifest.json").unlink()
    rotate(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]


def test_the_newest_checkpoint_is_the_one_written_last_not_that_of_the_highest_step(tmp_path):
    for step in (1, 5, 2):
        write(tmp_path, step)
    assert find_newest_valid(list_checkpoints(tmp_path))[0].step == 2
    rotate(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-2"]


def test_too_little_space_is_found_before_anything_is_written(tmp_path, monkeypatch):
    write(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 3 * 2**20))
    with (
        pytest.raises(Failed, match=r"step 2 .* 7\.0 MiB of 10\.0 are missing\); checkpoint-1 is complete, .*--resume"),
        staged_checkpoint(tmp_path, 2, {}, needed=10 * 2**20),
    ):
        pytest.fail("began to write")
    assert names(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", range(1, 6))
def test_a_disk_error_anywhere_in_a_save_is_one_line(tmp_path, monkeypatch, number, call):
    write(tmp_path, 1)
    left, fsync = [call], os.fsync

    def refusing(handle):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refusing)
    with pytest.raises(Failed) as failure:
        write(tmp_path, 2)
    assert os.strerror(number) in str(failure.value) and "\n" not in str(failure.value)
    assert find_newest_valid(list_checkpoints(tmp_path))[0].step == (1 if call < 5 else 2)  # the last call is after the rename
    assert not any(name.startswith(".") for name in names(tmp_path))


@pytest.fixture
def small_disk(tmp_path):
    """Return the folder of a file system of 1 MiB with a checkpoint on it."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        write(place, 1)
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)  # torch may still hold the file open


@pytest.mark.parametrize("library", ["torch", "safetensors", "plain"])
def test_a_disk_that_really_fills_up_is_one_line_for_every_writer(small_disk, library):
    """torch and safetensors raise errors that are not an OSError."""
    content = {"x": torch.zeros(2**19)}  # 2 MiB
    writers = {
        "torch": lambda path: torch.save(content, path),
        "safetensors": lambda path: save_file(content, path),
        "plain": lambda path: path.write_bytes(bytes(2**21)),
    }
    with (
        pytest.raises(
            Failed, match=r"step 2 cannot be written .* MiB of 2\.0 are missing\); checkpoint-1 is complete"
        ) as failure,
        staged_checkpoint(small_disk, 2, {}, needed=2**21) as folder,
    ):
        pytest.fail("was not refused")
    with (
        pytest.raises(Failed, match="checkpoint-1 is complete") as failure,
        staged_checkpoint(small_disk, 2, {}, needed=0) as folder,
    ):
        writers[library](folder / "big")
    assert "\n" not in str(failure.value)
    assert names(small_disk) == ["checkpoint-1"]  # the partial file is removed
    assert find_newest_valid(list_checkpoints(small_disk))[0].step == 1


def test_an_error_of_our_own_while_saving_is_not_turned_into_a_disk_error(tmp_path):
    with pytest.raises(RuntimeError, match="a mistake of ours"), staged_checkpoint(tmp_path, 2, {}, needed=0):
        raise RuntimeError("a mistake of ours")
