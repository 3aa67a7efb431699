"""Nothing is lost: checkpoints that are whole or not there, exact resuming, full disks, locks. Kills are real ones."""

import errno
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_qlora
from qlora_kit import cli
from qlora_kit.config_file import load_config
from qlora_kit.errors import Failed, UserError
from qlora_kit.fast.micro_step import MicroStep
from qlora_kit.output.checkpoints import clean, find_newest_valid, list_checkpoints, rotate, staged_checkpoint
from qlora_kit.output.folder import check_disk, check_output_dir
from qlora_kit.output.lock import LOCK, OutputLock
from qlora_kit.planning.plan import Plan, plan_inputs, resume_plan
from qlora_kit.planning.shape import ModelShape
from qlora_kit.training.checkpointing import ResumableTrainer, page_again
from qlora_kit.training.resume import find_checkpoint

FORK = multiprocessing.get_context("fork")
SMALL = [
    "--config", "configs/tiny.yaml", "--max_length", "16", "--batch_size", "1", "--rank", "4", "--dropout", "0.2",
    "--set", "data.max_train_samples=5", "--set", "data.max_eval_samples=2", "--set", "training.save_total_limit=null",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_the_repository(root, monkeypatch):
    monkeypatch.chdir(root)


def write(root: Path, step: int, text: str = "weights", **run) -> Path:
    with staged_checkpoint(root, step, run, needed=0) as folder:
        (folder / "adapter.txt").write_text(f"{text} of step {step}")
        (folder / "optimizer.txt").write_text("moments")
    return root / f"checkpoint-{step}"


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# --- whole, or not there ------------------------------------------------------------------------------------------------


def test_a_manifest_holds_size_and_hash_of_every_file(tmp_path):
    folder = write(tmp_path, 3, eval_loss=1.5)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["number"], manifest["run"]) == (3, 1, {"eval_loss": 1.5})
    sums = subprocess.run(["sha256sum", "adapter.txt", "optimizer.txt"], cwd=folder, capture_output=True, text=True, check=True)
    for line in sums.stdout.splitlines():
        digest, name = line.split()
        assert manifest["files"][name] == {"bytes": (folder / name).stat().st_size, "sha256": digest}
    assert set(manifest["files"]) == {"adapter.txt", "optimizer.txt"}


def test_everything_is_flushed_before_the_name_is_given_and_the_name_after_it(tmp_path, monkeypatch):
    """A power failure is not to be had in a test; the order of the calls that outlive one is."""
    calls, fsync, rename = [], os.fsync, os.rename
    where = Path("/proc/self/fd")
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(os.readlink(where / str(handle))), fsync(handle)))
    monkeypatch.setattr(os, "rename", lambda *paths: (calls.append("rename"), rename(*paths)))
    write(tmp_path, 3)
    staging = f"{tmp_path}/.saving/checkpoint-3"
    files = [f"{staging}/adapter.txt", f"{staging}/manifest.json", f"{staging}/optimizer.txt"]
    assert calls == [*files, staging, "rename", str(tmp_path)]


def damage(folder: Path, name: str) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


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
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, fault, reason):
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    fault(newer)
    checkpoint, passed_over = find_newest_valid(list_checkpoints(tmp_path))
    assert checkpoint.folder == older and (checkpoint.step, checkpoint.number) == (1, 1)
    (line,) = passed_over
    assert re.fullmatch(f"{newer}: {reason}", line), line
    assert newer.exists()  # until a newer valid one stands


@pytest.mark.parametrize("at", range(0, 10))
def test_every_single_bit_of_a_manifest_matters(tmp_path, at):
    folder = write(tmp_path, 1)
    content = bytearray((folder / "manifest.json").read_bytes())
    place = at * (len(content) - 1) // 10
    content[place] ^= 2
    (folder / "manifest.json").write_bytes(content)
    checkpoint, passed_over = find_newest_valid([folder])
    # White space between words may change without changing what they say.
    assert (checkpoint is None and len(passed_over) == 1) or bytes(content[place : place + 1]).isspace()


def kill_at(count: int, root: Path, step: int) -> None:
    """In a child: die by SIGKILL in place of the `count`-th of the calls that reach the disk."""
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


def killed_in_a_save(root: Path, step: int, count: int) -> bool:
    child = FORK.Process(target=kill_at, args=(count, root, step))
    child.start()
    child.join(20)
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "in the place of the only checkpoint"])
def test_a_kill_at_any_point_of_a_save_leaves_a_valid_checkpoint_and_no_rubbish(tmp_path, step):
    seen = set()
    for count in range(1, 30):
        root = tmp_path / str(count)
        write(root, 1)
        killed = killed_in_a_save(root, step, count)
        clean(root)
        checkpoint, passed_over = find_newest_valid(list_checkpoints(root))
        text = (checkpoint.folder / "adapter.txt").read_text()
        assert text in ("weights of step 1", f"new of step {step}") and passed_over == []
        assert all(name.startswith("checkpoint-") for name in names(root))
        seen.add(text)
        if not killed:
            assert text == f"new of step {step}"
            break
    assert count > 7 and len(seen) == 2  # every point was passed, some before the rename and some after it


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    write(tmp_path, 1)
    for name in (".saving/checkpoint-2", ".removed/checkpoint-1", ".replaced/checkpoint-1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "half").touch()
    clean(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]
    clean(tmp_path / "not there")


def test_an_output_folder_whose_only_checkpoint_stepped_aside_is_no_empty_one(tmp_path):
    place, aside = write(tmp_path / "checkpoints", 4), tmp_path / "checkpoints" / ".replaced"
    aside.mkdir()
    os.rename(place, aside / place.name)
    with pytest.raises(UserError, match="an unfinished run"):
        check_output_dir(str(tmp_path), overwrite=False, resume=False)


@pytest.mark.parametrize("limit, kept", [
    (None, [1, 2, 3, 4, 5]), (3, [2, 4, 5]), (2, [2, 5]), (1, [2, 5]),
])  # fmt: skip
def test_the_newest_and_the_best_are_kept(tmp_path, limit, kept):
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None)):
        write(tmp_path, step, eval_loss=loss)
    rotate(tmp_path, limit)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]


def test_what_early_stopping_would_go_back_to_is_kept_whatever_another_branch_reached(tmp_path):
    for step, loss in ((1, 2.0), (9, 1.0), (2, 3.0)):
        write(tmp_path, step, eval_loss=loss)
    rotate(tmp_path, 2, tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-9"]


def test_an_invalid_checkpoint_goes_when_a_newer_one_stands(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoint-2" / "manifest.json").unlink()
    rotate(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]


def test_the_newest_is_the_one_written_last_when_a_run_went_back(tmp_path):
    for step in (1, 5, 2):
        write(tmp_path, step)
    assert find_newest_valid(list_checkpoints(tmp_path))[0].step == 2
    rotate(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-2"]


# --- a disk that is full, read-only or failing --------------------------------------------------------------------------


def test_too_little_room_is_found_before_anything_is_written(tmp_path, monkeypatch):
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
def test_a_disk_that_refuses_anywhere_in_a_save_is_one_line(tmp_path, monkeypatch, number, call):
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
    assert find_newest_valid(list_checkpoints(tmp_path))[0].step == (1 if call < 5 else 2)  # the last is after the rename
    assert not any(name.startswith(".") for name in names(tmp_path))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB with a checkpoint on it."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        write(place, 1)
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)  # torch may still hold the file that it could not close


@pytest.mark.parametrize("library", ["torch", "safetensors", "plain"])
def test_a_disk_that_really_fills_up_is_one_line_whoever_writes(small_disk, library):
    """torch and safetensors raise errors that are no OSError."""
    content = {"x": torch.zeros(2**19)}  # 2 MiB
    ways = {
        "torch": lambda path: torch.save(content, path),
        "safetensors": lambda path: save_file(content, path),
        "plain": lambda path: path.write_bytes(bytes(2**21)),
    }
    with (
        pytest.raises(Failed, match=r"step 2 cannot be written .* MiB of 2\.0 are missing\); checkpoint-1 is complete") as failure,
        staged_checkpoint(small_disk, 2, {}, needed=2**21) as folder,
    ):
        pytest.fail("was not refused")
    with pytest.raises(Failed, match="checkpoint-1 is complete") as failure, staged_checkpoint(small_disk, 2, {}, needed=0) as folder:
        ways[library](folder / "big")
    assert "\n" not in str(failure.value)
    assert names(small_disk) == ["checkpoint-1"]  # what was begun gave its room back
    assert find_newest_valid(list_checkpoints(small_disk))[0].step == 1


def test_another_error_while_saving_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="a mistake of ours"), staged_checkpoint(tmp_path, 2, {}, needed=0):
        raise RuntimeError("a mistake of ours")


def test_a_full_disk_beside_a_save_is_one_line_and_status_1(capsys):
    def main():
        raise OSError(errno.ENOSPC, "No space left on device", "out/metrics.jsonl")

    with pytest.raises(SystemExit) as ending:
        cli.run(main)
    assert ending.value.code == 1
    assert capsys.readouterr().err.startswith("error: out/metrics.jsonl: cannot be written (No space left on device)")


def test_a_run_that_cannot_leave_a_checkpoint_and_its_adapter_does_not_begin(tmp_path, monkeypatch):
    """29,933,568 parameters at 4 bytes twice and 2 for the moments, 1 MiB beside and 16 for the tokenizer: 302.5 MiB."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 200 * 2**20))
    with pytest.raises(UserError, match=r"training\.output_dir: .*new: needs 302 MiB, .* 200 MiB free. Free 102 MiB there, or set training.output_dir"):
        check_disk(tmp_path / "new", 29_933_568, 2.0)
    check_disk(tmp_path / "new", 10_000_000, 2.0)


# --- one run at a time --------------------------------------------------------------------------------------------------


def hold(folder: Path, pipe) -> None:
    with OutputLock(folder) as lock:
        lock.take()
        pipe.send("held")
        pipe.poll(20)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder until something is sent to it."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=hold, args=(tmp_path / "out", there))
    process.start()
    assert here.poll(20)
    yield process, here
    if process.is_alive():
        process.kill()
    process.join(20)


def test_a_second_run_in_one_folder_is_refused_and_names_the_first(tmp_path, holder):
    process, pipe = holder
    with pytest.raises(UserError, match=rf"training\.output_dir: .*out: another run \(process {process.pid}\)"):
        OutputLock(tmp_path / "out").__enter__()
    assert names(tmp_path / "out") == [LOCK]  # the refused one took nothing away
    pipe.send("go")
    process.join(20)
    with OutputLock(tmp_path / "out") as lock:
        assert lock.take() is False  # held since the folder exists
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("system", ["has a lock", "has none"])
def test_the_lock_of_a_run_that_was_killed_is_taken_over(tmp_path, holder, monkeypatch, system):
    process, _ = holder
    if system == "has none":
        monkeypatch.setitem(sys.modules, "fcntl", None)
        with pytest.raises(UserError, match=str(process.pid)):
            OutputLock(tmp_path / "out").take()
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    assert names(tmp_path / "out") == [LOCK]
    with OutputLock(tmp_path / "out"):
        assert int((tmp_path / "out" / LOCK).read_text()) == os.getpid()
    assert names(tmp_path / "out") == []


def test_a_run_in_a_folder_that_is_taken_is_refused_before_it_reads_its_checkpoints(tmp_path, holder):
    for arguments in ([], ["--resume"], ["--overwrite"]):
        with pytest.raises(UserError, match="another run"):
            train_qlora.main([*SMALL, *arguments, "--output_dir", str(tmp_path / "out")])


def test_a_new_folder_is_not_made_before_there_is_something_to_write(tmp_path):
    with OutputLock(tmp_path / "out") as lock:
        assert not (tmp_path / "out").exists()
        assert lock.take() is True


# --- going on exactly ---------------------------------------------------------------------------------------------------


def result(folder: Path) -> tuple[bytes, list[tuple]]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")
    return (folder / "adapter_model.safetensors").read_bytes(), [tuple(entry.get(key) for key in keys) for entry in entries]


def log_steps(folder: Path) -> list[str]:
    lines = (folder / "training_log.txt").read_text().splitlines()
    return [line.partition(":")[0] for line in lines if line.startswith("step ")]


@pytest.mark.parametrize("path, points", [
    (["--set", "performance.fused_lora=true"], (2, 3)),
    (["--set", "performance.fused_lora=false"], (5,)),  # its dropout draws from torch's generator
    (["--dataset", "samples/alpaca.jsonl"], (1,)),
], ids=["fast", "library", "packed"])  # fmt: skip
def test_a_run_resumed_from_any_step_is_the_uninterrupted_one(tmp_path, path, points):
    """5 blocks in steps of 2, the last of an epoch short: 7 steps are 2 epochs and a third. Steps are logged in threes."""
    whole = tmp_path / "whole"
    flags = [*SMALL, *path, "--max_steps", "7", "--set", "training.save_steps=1", "--set", "training.logging_steps=3",
             "--set", "training.eval_steps=4"]  # fmt: skip
    train_qlora.main([*flags, "--output_dir", str(whole)])
    expected, steps = result(whole), log_steps(whole)
    assert steps == ["step 1/7", "step 3/7", "step 4", "step 6/7", "step 7"]
    for step in points:  # within an epoch, at its end, and between two logged steps
        part = tmp_path / str(step)
        shutil.copytree(whole / "checkpoints" / f"checkpoint-{step}", part / "checkpoints" / f"checkpoint-{step}")
        train_qlora.main([*flags, "--output_dir", str(part), "--resume"])
        assert result(part) == expected, step
        assert log_steps(part) == steps
        final = [folder / "checkpoints" / "checkpoint-7" for folder in (whole, part)]
        saved = [torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in final]
        assert str(saved[0]) == str(saved[1])
        assert len(names(part / "checkpoints")) == 8 - step


def test_a_run_resumed_around_a_step_that_was_left_out_is_the_uninterrupted_one(tmp_path, monkeypatch):
    """The third step of seven has no number for a loss; steps are logged in threes. What was left out counts on."""
    real, bad = MicroStep.train, [3]
    monkeypatch.setattr(MicroStep, "train", lambda micro, *rest: real(micro, *rest) * (math.nan if micro.step + 1 in bad else 1))
    whole = tmp_path / "whole"
    flags = [*SMALL, "--max_steps", "7", "--set", "training.save_steps=1", "--set", "training.logging_steps=3",
             "--set", "training.max_skipped_steps=1", "--set", "data.eval_split=null"]  # fmt: skip
    train_qlora.main([*flags, "--output_dir", str(whole)])
    expected = result(whole)
    assert [entry[0] for entry in expected[1]] == [1, 3, 6]  # of steps 2 and 3 the mean is that of 2
    for step in (2, 3):  # before it, upon it
        part = tmp_path / str(step)
        shutil.copytree(whole / "checkpoints" / f"checkpoint-{step}", part / "checkpoints" / f"checkpoint-{step}")
        train_qlora.main([*flags, "--output_dir", str(part), "--resume"])
        assert result(part) == expected, step
        assert (part / "training_log.txt").read_text().count("is left out") == 1
    bad.append(6)
    again = [*flags, "--output_dir", str(part), "--resume", str(part / "checkpoints" / "checkpoint-5")]
    with pytest.raises(Failed, match=r"nan at step 6.*max_skipped_steps=2.*checkpoint-\d is complete"):
        train_qlora.main(again)
    train_qlora.main([*again, "--set", "training.max_skipped_steps=2"])
    assert "Changed since: training.max_skipped_steps: 2, was 1" in (part / "training_log.txt").read_text()
    assert json.loads((part / "run.json").read_text())["skipped_steps"] == [3, 6]


def test_a_run_whose_first_step_was_left_out_goes_on_with_an_optimizer_that_has_seen_nothing(tmp_path, monkeypatch):
    """That step was the only one to be logged."""
    real, out = MicroStep.train, tmp_path / "out"
    monkeypatch.setattr(MicroStep, "train", lambda micro, *rest: real(micro, *rest) * (math.nan if micro.step == 0 else 1))
    flags = [*SMALL, "--max_steps", "2", "--set", "training.save_steps=1", "--set", "training.max_skipped_steps=1",
             "--set", "data.eval_split=null", "--output_dir", str(out)]  # fmt: skip
    train_qlora.main(flags)
    before = result(out)
    train_qlora.main([*flags, "--resume", str(out / "checkpoints" / "checkpoint-1")])
    assert result(out) == before and before[1] == []


@pytest.fixture(scope="module")
def begun(root, tmp_path_factory):
    """An output folder with the checkpoints of steps 1 and 2 of 4, as a killed run leaves it; to be copied."""
    folder = tmp_path_factory.mktemp("begun") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        flags = [*SMALL, "--max_steps", "4", "--set", "training.save_steps=1", "--output_dir", str(folder)]
        train_qlora.main(flags)
    final = result(folder)
    for step in (3, 4):
        shutil.rmtree(folder / "checkpoints" / f"checkpoint-{step}")
    (folder / "adapter_model.safetensors").unlink()
    return folder, final


@pytest.fixture
def go_on(begun, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(begun[0], out)

    def resume(*arguments: str):
        train_qlora.main(
            [*SMALL, "--max_steps", "4", "--set", "training.save_steps=1", *arguments, "--output_dir", str(out), "--resume"]
        )
        return result(out)

    resume.out = out
    return resume


def test_a_damaged_newest_checkpoint_costs_its_steps_and_not_the_run(begun, go_on, capsys):
    damage(go_on.out / "checkpoints" / "checkpoint-2", "optimizer.pt")
    (go_on.out / "checkpoints" / ".saving" / "checkpoint-3").mkdir(parents=True)
    assert go_on() == begun[1]
    log = (go_on.out / "training_log.txt").read_text()
    for text in (capsys.readouterr().err, log):
        assert "checkpoint-2: optimizer.pt was changed after it was written" in text and "Going on from step 1" in text
    assert names(go_on.out / "checkpoints") == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert find_newest_valid([go_on.out / "checkpoints" / "checkpoint-2"])[1] == []  # written anew


def test_without_a_valid_checkpoint_each_is_named_and_nothing_is_touched(go_on):
    for step in (1, 2):
        (go_on.out / "checkpoints" / f"checkpoint-{step}" / "manifest.json").unlink()
    before = sorted(go_on.out.rglob("*"))
    with pytest.raises(UserError) as error:
        go_on()
    assert len(error.value.lines) == 2 and all("has no manifest.json" in problem for problem in error.value.lines)
    assert sorted(go_on.out.rglob("*")) == before


@pytest.mark.parametrize("wanted, number", [("", 2), (".", 2), ("checkpoints", 2), ("checkpoints/checkpoint-1", 1)])
def test_a_checkpoint_or_any_folder_that_holds_them_can_be_named(begun, wanted, number):
    folder, config = begun[0], load_config(begun[0] / "config.yaml")
    checkpoint, _ = find_checkpoint(folder, config, wanted and str(folder / wanted))
    assert checkpoint.folder.name == f"checkpoint-{number}"


def test_what_may_change_is_noted_in_the_log(go_on):
    go_on("--set", "training.logging_steps=1", "--set", "training.report_to=none")
    assert "Changed since: training.logging_steps: 1, was 5" in (go_on.out / "training_log.txt").read_text()


def test_other_data_under_the_same_name_is_refused_before_weights_are_loaded(begun, go_on, tmp_path, monkeypatch):
    data = tmp_path / "articles.txt"
    shutil.copy("samples/articles.txt", data)
    out = tmp_path / "on a copy"
    flags = [*SMALL, "--dataset", str(data), "--set", "training.save_steps=1", "--output_dir", str(out)]
    train_qlora.main([*flags, "--max_steps", "1"])
    data.write_text(data.read_text().replace("the", "a"))
    monkeypatch.setattr(train_qlora, "load_adapted_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"data\.dataset: the training data is not what the run to resume was trained on"):
        train_qlora.main([*flags, "--max_steps", "2", "--resume"])


@pytest.mark.parametrize("file, what", [("model.safetensors", "base weights are"), ("tokenizer.json", "tokenizer is")])
def test_another_model_under_the_same_name_is_refused_before_it_is_loaded(tiny_dir, tmp_path, monkeypatch, file, what):
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    flags = [*SMALL, "--model_name", str(model), "--set", "training.save_steps=1", "--output_dir", str(tmp_path / "out")]
    train_qlora.main([*flags, "--max_steps", "1"])
    if file == "tokenizer.json":
        content = json.loads((model / file).read_text())
        content["model"]["merges"] = content["model"]["merges"][:-1]
        (model / file).write_text(json.dumps(content))
    else:
        weights = load_file(model / file)
        next(iter(weights.values())).view(-1)[0] += 1
        save_file(weights, model / file, {"format": "pt"})
    monkeypatch.setattr(train_qlora, "load_adapted_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError) as error:
        train_qlora.main([*flags, "--max_steps", "2", "--resume"])
    assert any(problem.startswith(f"model.name: the {what} not what") for problem in error.value.lines)


def test_a_disk_that_fills_up_in_a_run_ends_it_in_one_line(go_on, monkeypatch, capsys):
    saves = []

    def free(path):
        saves.append(path)
        return shutil._ntuple_diskusage(0, 0, 2**40 if len(saves) < 3 else 0)  # before the run, step 3, step 4

    monkeypatch.setattr(shutil, "disk_usage", free)
    with pytest.raises(SystemExit) as ending:
        cli.run(go_on)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert ending.value.code == 1
    assert last.startswith("error: the checkpoint of step 4 cannot be written") and "checkpoint-3 is complete" in last
    monkeypatch.undo()
    monkeypatch.chdir(Path(__file__).parents[2])
    assert find_newest_valid(list_checkpoints(go_on.out / "checkpoints"))[0].step == 3


def test_early_stopping_counts_on_where_it_was(tmp_path):
    """At this rate no evaluation is better than the first: two more end the run, wherever it was interrupted."""
    flags = [*SMALL, "--max_steps", "9", "--learning_rate", "0.05", "--set", "training.warmup_ratio=0", "--set",
             "training.early_stopping_patience=2", "--set", "training.eval_steps=1", "--set",
             "training.lr_scheduler=constant", "--set", "training.save_steps=1"]  # fmt: skip
    train_qlora.main([*flags, "--output_dir", str(tmp_path / "whole")])
    expected = result(tmp_path / "whole")
    steps = len(names(tmp_path / "whole" / "checkpoints"))
    assert 2 < steps < 9
    for step in (steps - 1, steps):
        out = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole", out)
        for later in range(step + 1, steps + 1):
            shutil.rmtree(out / "checkpoints" / f"checkpoint-{later}")
        train_qlora.main([*flags, "--output_dir", str(out), "--resume"])
        assert result(out) == expected


# --- the division, and paged state --------------------------------------------------------------------------------------


def test_a_resumed_run_is_divided_as_before_unless_asked_otherwise():
    config = load_config(Path("configs/tiny.yaml"), {"training.batch_size": 8, "training.gradient_accumulation_steps": 1})
    before = {"micro_batch": 4, "recomputed": 3, "keep_weights": False}
    now = Plan(8, 0, {})
    assert resume_plan(now, config, None, None, before, settings_unchanged=True) == Plan(4, 3, {})
    assert resume_plan(now, config, None, None, before, settings_unchanged=False) == now
    shape = ModelShape("qwen2", 6, 192, 6, 2, 32, 512, 6144, True)
    planned = Plan(8, 0, {"all": 1e6})
    assert resume_plan(planned, config, shape, 1e12, before, settings_unchanged=True).micro_batch == 4
    assert resume_plan(planned, config, shape, 1e3, before, settings_unchanged=True) == planned  # that no longer fits
    other = load_config(Path("configs/tiny.yaml"), {"performance.micro_batch": 2})
    assert plan_inputs(other) != plan_inputs(config)
    assert plan_inputs(config) == plan_inputs(load_config(Path("configs/tiny.yaml")))


def test_a_run_that_had_run_out_of_memory_goes_on_with_as_little(tmp_path, monkeypatch):
    flags = [*SMALL, "--batch_size", "2", "--set", "training.save_steps=1", "--output_dir", str(tmp_path / "out")]
    about = ResumableTrainer._about
    monkeypatch.setattr(ResumableTrainer, "_about", lambda trainer: about(trainer) | {"rows": 1})
    train_qlora.main([*flags, "--max_steps", "1"])
    monkeypatch.undo()
    monkeypatch.chdir(Path(__file__).parents[2])
    train_qlora.main([*flags, "--max_steps", "2", "--resume"])
    assert json.loads((tmp_path / "out" / "run.json").read_text())["micro_batch"] == 1


def test_loaded_moments_are_paged_again(tmp_path):
    """With bitsandbytes' own optimizer; only the memory stands in for a GPU's."""
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    def allocate(*shape, dtype, device):
        tensor = torch.empty(*shape, dtype=dtype, device=device)
        tensor.is_paged = True
        return tensor

    large, small = (torch.nn.Parameter(torch.ones(size)) for size in (100_000, 8_192))
    optimizer = PagedAdamW8bit([large, small])
    for parameter in (large, small):
        parameter.grad = torch.linspace(-1, 1, parameter.numel())
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = PagedAdamW8bit([large, small])
    loaded.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    loaded.page_mng.paged_tensors.clear()
    before = {name: value.clone() for name, value in loaded.state[large].items() if isinstance(value, torch.Tensor)}
    assert page_again(loaded, allocate) == 2  # both moments of the large one
    assert all(loaded.state[large][name].is_paged for name in ("state1", "state2"))
    assert not any(getattr(value, "is_paged", False) for value in loaded.state[small].values())
    assert all(torch.equal(loaded.state[large][name], value) for name, value in before.items())
    assert {id(tensor) for tensor in loaded.page_mng.paged_tensors} == {id(loaded.state[large][n]) for n in ("state1", "state2")}
    assert page_again(loaded, allocate) == 0
    loaded.page_mng.paged_tensors.clear()
    plain = AdamW8bit([large])
    plain.load_state_dict({**plain.state_dict(), "state": {0: optimizer.state_dict()["state"][0]}})
    assert page_again(plain, allocate) == page_again(torch.optim.AdamW([large]), allocate) == 0
