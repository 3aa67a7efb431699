"""One run per output folder; the other process and its death are real."""

import errno
import fcntl
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

import train_qlora
from qlora_kit.errors import UserError
from qlora_kit.output.lock import LOCK, OutputLock
from tests.tiny_run import SMALL, names

FORK = multiprocessing.get_context("fork")


def hold(folder: Path, pipe) -> None:
    """Hold the lock until something arrives through the pipe; runs in a child process."""
    with OutputLock(folder) as lock:
        lock.take()
        pipe.send("held")
        pipe.poll(20)


@pytest.fixture
def holder(tmp_path):
    """Start another process that holds the folder until it receives something."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=hold, args=(tmp_path / "out", there))
    process.start()
    assert here.poll(20)
    yield process, here
    if process.is_alive():
        process.kill()
    process.join(20)


def test_a_second_run_in_one_folder_is_refused_with_the_process_of_the_first(tmp_path, holder):
    process, pipe = holder
    with pytest.raises(UserError, match=rf"training\.output_dir: .*out: is in use by another run \(process {process.pid}, "):
        OutputLock(tmp_path / "out").__enter__()
    assert names(tmp_path / "out") == [LOCK]  # the refused run removed nothing
    pipe.send("go")
    process.join(20)
    with OutputLock(tmp_path / "out") as lock:
        assert lock.take() is False  # entering took it, since the folder exists
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("has_locks", [True, False], ids=["locks", "no locks"])
def test_the_lock_of_a_killed_run_is_taken_over_also_on_a_file_system_without_locks(tmp_path, holder, monkeypatch, has_locks):
    process, _ = holder
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
        with pytest.raises(UserError, match=str(process.pid)):
            OutputLock(tmp_path / "out").take()
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    assert names(tmp_path / "out") == [LOCK]
    with OutputLock(tmp_path / "out"):
        assert int((tmp_path / "out" / LOCK).read_text()) == os.getpid()
    assert names(tmp_path / "out") == []


def test_a_run_in_a_locked_folder_is_refused_before_its_checkpoints_are_read(root, tmp_path, monkeypatch, holder):
    monkeypatch.chdir(root)
    for arguments in ([], ["--resume"], ["--overwrite"]):
        with pytest.raises(UserError, match="in use by another run"):
            train_qlora.main([*SMALL, *arguments, "--output_dir", str(tmp_path / "out")])


def test_a_new_folder_is_not_created_before_there_is_something_to_write(tmp_path):
    with OutputLock(tmp_path / "out") as lock:
        assert not (tmp_path / "out").exists()
        assert lock.take() is True


@pytest.mark.parametrize("make", [
    lambda path: path.symlink_to(path.parent.parent / "precious"), lambda path: path.symlink_to("nowhere"), Path.mkdir, os.mkfifo,
], ids=["link", "dangling link", "folder", "pipe"])  # fmt: skip
def test_a_lock_that_is_no_file_is_neither_followed_nor_waited_for(tmp_path, make):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / LOCK)
    with pytest.raises(UserError, match=r"^--output: .*/\.lock: cannot be used as a lock .*\. Delete it .*another --output\.$"):
        OutputLock(tmp_path / "out", "--output", "--output").take()
    assert (tmp_path / "precious").read_text() == "kept" and not (tmp_path / "out" / "nowhere").exists()


def test_a_process_number_that_no_process_can_have_locks_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    for number in ("9" * 20, "\u00b2", "\x1b[31m"):
        (tmp_path / LOCK).write_text(number)
        with OutputLock(tmp_path):
            assert int((tmp_path / LOCK).read_text()) == os.getpid()
