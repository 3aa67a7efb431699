"""Several processes as one run: on two CPU processes, as torchrun starts them, against one."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

import train_qlora
from qlora_kit.config_file import load_config
from qlora_kit.errors import Failed, Stopped, UserError
from qlora_kit.planning.plan import check_division, make_plan
from qlora_kit.training import processes
from qlora_kit.training.build import IGNORED, OwnRows
from qlora_kit.training.processes import EveryNth, Team, check_alike, choose_own_gpu, connected, find_team

# Fails at a step of choice in the second process; else it is train_qlora.py.
SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
import train_qlora
from qlora_kit import cli
cli.prepare_libraries()
from qlora_kit.training.trainer import QLoraTrainer
untouched = QLoraTrainer.training_step
def training_step(self, *arguments, **named):
    if self.team.rank == 1 and self.state.global_step == 5:
        {what}
    return untouched(self, *arguments, **named)
QLoraTrainer.training_step = training_step
cli.run(train_qlora.main)
"""
SETTINGS = (
    "--config", "configs/tiny.yaml", "--max_length", "64", "--max_steps", "7", "--set", "training.logging_steps=1",
    "--set", "training.save_steps=3", "--set", "training.eval_steps=7", "--set", "data.max_train_samples=50",
    "--set", "data.max_eval_samples=9",
)  # fmt: skip


LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def together(root, tmp_path, output, *more, what="pass"):
    """Exit status of two processes, and what they said."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(root), what=what))
    run = subprocess.run(
        [*LAUNCH, str(script), *SETTINGS, "--output_dir", str(output), *more],
        cwd=root, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return run.returncode, run.stderr


def lines(said, *words):
    return [line for line in said.splitlines() if any(word in line for word in words)]


def difference(one, other):
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return max((a[name] - b[name]).abs().max().item() for name in a), max(value.abs().max().item() for value in a.values())


def test_two_processes_train_what_one_does_also_when_one_is_killed_and_when_they_then_divide_the_base(
    root, tmp_path, monkeypatch
):
    """50 blocks in steps of 8: in the epoch's last, the seventh, one process has two sequences and the other none."""
    alone, output = tmp_path / "alone", tmp_path / "two"
    monkeypatch.chdir(root)
    train_qlora.main([*SETTINGS, "--output_dir", str(alone)])
    started = time.perf_counter()
    status, said = together(root, tmp_path, output, what="os.kill(os.getpid(), 9)")
    assert status and time.perf_counter() - started < 60
    assert lines(said, "error:") == ["error: rank 0: another process of the run has ended without a word; go on with --resume"]
    assert len(lines(said, "step 5/7")) == 1  # the first process alone speaks
    status, said = together(root, tmp_path, output, "--resume", "--set", "performance.fsdp=true")
    assert status == 0 and not lines(said, "error:")
    apart, size = difference(alone, output)
    assert apart < 0.005 * size
    losses = [[line.split("loss ")[1][:6] for line in lines((folder / "training_log.txt").read_text(), "/7: loss")]
              for folder in (alone, output)]  # fmt: skip
    assert len(losses[0]) == 7
    assert [float(loss) for loss in losses[1]] == pytest.approx([float(loss) for loss in losses[0]], abs=2e-4)
    perplexities = [lines((folder / "training_log.txt").read_text(), "  ->  ")[0] for folder in (alone, output)]
    assert perplexities[0].split("->")[0] == perplexities[1].split("->")[0]


# The second process fails while the first one waits for it.
FAILS = """
import sys
sys.path.insert(0, {root!r})
from qlora_kit import cli
from qlora_kit.training.processes import connected, find_team
def main():
    team = find_team()
    with connected(team):
        if team.rank == 1:
            raise ZeroDivisionError("by zero")
        team.gather("never comes")
cli.run(main)
"""


def test_what_fails_in_one_process_ends_all_in_one_line(root, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(FAILS.format(root=str(root)))
    started = time.perf_counter()
    run = subprocess.run([*LAUNCH, str(script)], capture_output=True, text=True, timeout=60)
    assert run.returncode and time.perf_counter() - started < 30
    assert lines(run.stderr, "error:") == ["error: rank 1: ZeroDivisionError: by zero"]
    assert not lines(run.stderr, "terminate called", "SIGABRT")  # Python's end met the watching thread inside the store


def test_who_watches_says_when_it_has_left_the_store(monkeypatch):
    order, outside = [], threading.Event()
    monkeypatch.setattr("time.sleep", lambda seconds: order.append(outside.is_set()))
    monkeypatch.setattr("os._exit", order.append)
    store = torch.distributed.HashStore()
    store.set(processes.FAILURE, "1")
    processes._end_with_the_others(store, threading.Event(), outside)
    assert order == [True, 1]


# In one process


def test_all_stop_together_and_only_when_the_first_has_drawn_the_curves(root, tmp_path, monkeypatch):
    """Another process was asked to stop in the evaluation of the last step. One that leaves early would name itself as failed."""

    def highest(team, own):
        return signal.SIGTERM if (tmp_path / "training_curves.png").exists() else own

    monkeypatch.chdir(root)
    monkeypatch.setattr(Team, "highest", highest)
    short = ("--max_steps", "1", "--set", "data.max_train_samples=8", "--set", "data.max_eval_samples=1")
    with pytest.raises(Stopped, match="Stopped after step 1; everything is saved") as stop:
        train_qlora.main([*SETTINGS, *short, "--output_dir", str(tmp_path)])
    assert stop.value.status == 143 and not (tmp_path / "run.json").exists()


@pytest.mark.parametrize(
    "error, said",
    [
        (UserError("data.dataset: a.txt: no such file"), "rank 1: data.dataset: a.txt: no such file"),
        (Failed("the disk is full"), "rank 1: the disk is full"),
    ],
)
def test_the_first_that_fails_names_itself_and_the_others_are_silent(monkeypatch, error, said):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    store = torch.distributed.HashStore()
    first, second = (Team(rank, 2, store=store) for rank in (0, 1))
    ending = processes._as_one(second, error)
    assert (type(ending), str(ending)) == (type(error), said)
    follows = processes._as_one(first, RuntimeError("Connection closed by peer"))
    assert type(follows) is SystemExit and follows.code == 1


def config(root, **keys):
    return load_config(root / "config.yaml", keys)


def test_processes_share_a_step_evenly_or_not_at_all(root):
    usual = config(root)  # 1 x 16
    for count in (1, 2, 16):
        check_division(usual, count)
    with pytest.raises(UserError, match=r"number of processes: 3: does not divide the 16 sequences .*training.batch_size"):
        check_division(usual, 3)
    with pytest.raises(UserError, match=r"performance.micro_batch: 4: does not divide the 2 sequences of each process"):
        check_division(config(root, **{"performance.micro_batch": 4}), 8)
    assert (
        make_plan(
            config(root, **{"training.batch_size": 4, "training.gradient_accumulation_steps": 4}), None, None, 8
        ).micro_batch
        == 2
    )


@pytest.mark.parametrize(
    "visible, local_rank, own", [(None, 0, "0"), ("2,3", 0, "2"), ("2,3", 1, "3"), ("2,3", 2, ""), ("1", 0, "1"), ("", 0, "")]
)
def test_a_process_sees_one_gpu(monkeypatch, visible, local_rank, own):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    choose_own_gpu(local_rank)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own


def test_who_a_process_is_stands_in_its_environment(monkeypatch):
    assert find_team() == Team(0, 1, 0, 1)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert find_team() == Team(5, 8, 1, 4) and not find_team().leads


def test_a_rank_without_a_group_is_a_process_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_team() == Team()


def test_a_wrong_flag_of_one_process_alone_is_not_lost(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="--bogus: is not a flag"):
        train_qlora.parse_arguments(["--bogus"])
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    store = torch.distributed.HashStore()
    assert str(processes._as_one(Team(1, 2, store=store), UserError("--bogus: unknown flag"))) == "rank 1: --bogus: unknown flag"
    follows = processes._as_one(Team(0, 2, store=store), SystemExit(2))
    assert type(follows) is SystemExit and follows.code == 2 and not capsys.readouterr().err


@pytest.mark.parametrize("port, named", [(None, "MASTER_PORT"), ("99999", "MASTER_PORT"), ("29500", "MASTER_ADDR")])
def test_a_group_size_that_no_launcher_has_set_is_one_error(monkeypatch, port, named):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    if named != "MASTER_ADDR":
        monkeypatch.setenv("MASTER_ADDR", "localhost")
    if port:
        monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=f"WORLD_SIZE: 2: .* {named} is not as torchrun sets it; start with torchrun"):
        with connected(find_team()):
            pass


def test_shares_hold_every_item_once_and_join_to_the_whole(monkeypatch):
    items = list("abcdefg")
    parts = [[part[at] for at in range(len(part))] for part in (EveryNth(items, rank, 3) for rank in range(3))]
    assert parts == [list("adg"), list("beg"), list("cfg")]  # as many in each
    team = Team(1, 3)
    monkeypatch.setattr(team, "gather", lambda own: parts)
    assert team.joined(parts[1])[: len(items)] == items


def test_rows_are_taken_once_and_a_process_without_any_counts_for_nothing():
    rows = [{"input_ids": torch.full((4,), n), "labels": torch.full((4,), n), "block": torch.tensor(n)} for n in range(3)]
    taken = [OwnRows(Team(rank, 3), 2)(rows) for rank in range(3)]
    assert [batch["block"].tolist() for batch in taken] == [[0, 1], [2], [-1]]
    assert (taken[2]["labels"] == IGNORED).all() and taken[1]["labels"].tolist() == [[2] * 4]


def test_processes_that_differ_are_told_apart(monkeypatch):
    team = Team(1, 3)
    monkeypatch.setattr(team, "gather", lambda own: [{"lora.rank": "8"}, {"lora.rank": "8"}, {"lora.rank": "16"}])
    with pytest.raises(UserError, match=r"lora.rank: rank 2 has 16, rank 0 has 8"):
        check_alike(team, {"lora.rank": "8"})


def test_a_gpu_for_some_processes_is_refused(monkeypatch):
    team = Team(0, 3)
    monkeypatch.setattr(team, "gather", lambda own: [True, True, False])
    with pytest.raises(UserError, match="rank 2: has no GPU of its own, while rank 0 has"):
        processes.check_gpus(team)
