"""Several processes as one run: two CPU processes compared with one."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_qlora
from qlora_kit.config_file import load_config
from qlora_kit.errors import Failed, Problem, Stopped, UserError
from qlora_kit.planning.plan import check_division, make_plan
from qlora_kit.training import processes
from qlora_kit.training.build import IGNORED, RankCollator
from qlora_kit.training.processes import Team, check_identical, choose_own_gpu, connect, read_team
from tests import forked
from tests.tiny_run import TWO_LAYERS

# train_qlora.py, in which rank 1 executes {what} after step 5.
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
    "--config", "configs/tiny.yaml", "--model_name", str(TWO_LAYERS), "--max_length", "32", "--max_steps", "7",
    "--set", "training.logging_steps=1", "--set", "training.save_steps=3", "--set", "training.eval_steps=7",
    "--set", "data.max_train_samples=50", "--set", "data.max_eval_samples=9",
)  # fmt: skip


LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def run_torchrun(command):
    return subprocess.run([*LAUNCH, *command], capture_output=True, text=True, timeout=120)


def train_on_two(launch, root, tmp_path, output, *more, what="pass"):
    """Return the exit status of two processes and their standard error."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(root), what=what))
    run = launch([str(script), *SETTINGS, "--output_dir", str(output), *more])
    return run.returncode, run.stderr


def lines(text, *words):
    return [line for line in text.splitlines() if any(word in line for word in words)]


def difference(one, other):
    """Return the greatest difference of two adapters, and the greatest value of the second."""
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return max((a[name] - b[name]).abs().max().item() for name in a), max(value.abs().max().item() for value in a.values())


@pytest.mark.parametrize("launch", [forked.run_ranks, pytest.param(run_torchrun, marks=pytest.mark.slow)])
def test_two_processes_train_what_one_does_also_after_a_kill_and_with_a_sharded_base(root, tmp_path, monkeypatch, launch):
    """50 blocks in steps of 8: in the last step of the epoch, the seventh, one process has two sequences and the other none."""
    alone, output = tmp_path / "alone", tmp_path / "two"
    monkeypatch.chdir(root)
    train_qlora.main([*SETTINGS, "--output_dir", str(alone)])
    started = time.perf_counter()
    status, stderr = train_on_two(launch, root, tmp_path, output, what="os.kill(os.getpid(), 9)")
    assert status and time.perf_counter() - started < 60
    assert lines(stderr, "error:") == ["error: rank 0: another process ended unexpectedly; continue with --resume"]
    assert len(lines(stderr, "step 5/7")) == 1  # rank 0 alone prints
    status, stderr = train_on_two(launch, root, tmp_path, output, "--resume", "--set", "performance.fsdp=true")
    assert status == 0 and not lines(stderr, "error:"), stderr
    apart, size = difference(alone, output)
    assert apart < 0.005 * size
    losses = [[line.split("loss ")[1][:6] for line in lines((folder / "training_log.txt").read_text(), "/7: loss")]
              for folder in (alone, output)]  # fmt: skip
    assert len(losses[0]) == 7
    assert [float(loss) for loss in losses[1]] == pytest.approx([float(loss) for loss in losses[0]], abs=2e-4)
    perplexities = [lines((folder / "training_log.txt").read_text(), "  ->  ")[0] for folder in (alone, output)]
    assert perplexities[0].split("->")[0] == perplexities[1].split("->")[0]


# Rank 1 fails while rank 0 waits for it.
FAILS = """
import sys
sys.path.insert(0, {root!r})
from qlora_kit import cli
from qlora_kit.training.processes import connect, read_team
def main():
    team = read_team()
    with connect(team):
        if team.rank == 1:
            raise ZeroDivisionError("by zero")
        team.gather("never comes")
cli.run(main)
"""


@pytest.mark.slow
def test_a_failure_in_one_process_ends_all_with_one_line(root, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(FAILS.format(root=str(root)))
    started = time.perf_counter()
    run = run_torchrun([str(script)])
    assert run.returncode and time.perf_counter() - started < 60
    assert lines(run.stderr, "error:") == ["error: rank 1: ZeroDivisionError: by zero"]
    # Python must not exit while the watching thread is inside the store.
    assert not lines(run.stderr, "terminate called", "SIGABRT")


# Two ranks, of a process that imports torch alone. What is imported after they are connected, as the Trainer is, may keep the
# process group.
THREADS = """
import os
from pathlib import Path
import torch
from qlora_kit.training.processes import connect, read_team
child = os.fork()
os.environ["RANK"] = str(int(child == 0))
def gloo_threads():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("pt_gloo_runloop")
with connect(read_team()):
    import torch.distributed.nn
    connected = gloo_threads()
print(connected > 0, gloo_threads())
if child:
    os.waitpid(child, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads")
def test_no_thread_of_gloo_outlives_the_connection(root):
    """A Gloo thread that frees a tensor while Python exits aborts the process, after everything is saved: 2 of 25 runs."""
    with socket.create_server(("localhost", 0)) as server:
        team = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1])}
    ranks = subprocess.run(
        [sys.executable, "-c", THREADS], cwd=root, capture_output=True, text=True, timeout=120, env=os.environ | team
    )
    assert ranks.stdout == "True 0\n" * 2, ranks.stderr


def test_the_watching_thread_announces_that_it_left_the_store(monkeypatch):
    order, left_store = [], threading.Event()
    monkeypatch.setattr("time.sleep", lambda seconds: order.append(left_store.is_set()))
    monkeypatch.setattr("os._exit", order.append)
    store = torch.distributed.HashStore()
    store.set(processes.FAILURE, "1")
    processes._exit_after_failure(store, threading.Event(), left_store)
    assert order == [True, 1]


def test_all_stop_together_and_only_after_rank_0_has_drawn_the_curves(root, tmp_path, monkeypatch):
    """Another process got the signal in the evaluation of the last step. A process that ends early is reported as failed."""

    def greatest(team, own):
        return signal.SIGTERM if (tmp_path / "checkpoints" / "checkpoint-1").exists() else own

    monkeypatch.chdir(root)
    monkeypatch.setattr(Team, "max", greatest)
    short = ("--max_steps", "1", "--set", "data.max_train_samples=8", "--set", "data.max_eval_samples=1")
    with pytest.raises(Stopped, match="Stopped after step 1; everything is saved") as stop:
        train_qlora.main([*SETTINGS, *short, "--output_dir", str(tmp_path)])
    assert stop.value.status == 143 and not (tmp_path / "run.json").exists()
    assert (tmp_path / "training_curves.png").exists()


@pytest.mark.parametrize(
    "error, message",
    [
        (
            UserError("data.dataset", "a.txt", "does not exist", "use another file"),
            "rank 1: data.dataset: a.txt: does not exist. Use another file.",
        ),
        (
            UserError.of([Problem("lora.rank", 0, "is too small", "use 1 or more", place="a.yaml:3")]),
            "rank 1: a.yaml:3: lora.rank: 0: is too small. Use 1 or more.",
        ),
        (Failed("the disk is full"), "rank 1: the disk is full"),
    ],
)
def test_the_first_process_that_fails_names_its_rank_and_the_others_are_silent(monkeypatch, error, message):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    store = torch.distributed.HashStore()
    first, second = (Team(rank, 2, store=store) for rank in (0, 1))
    ending = processes._choose_ending(second, error)
    assert (type(ending), str(ending)) == (type(error), message)
    follows = processes._choose_ending(first, RuntimeError("Connection closed by peer"))
    assert type(follows) is SystemExit and follows.code == 1


def config(root, **keys):
    return load_config(root / "config.yaml", keys)


def test_a_step_that_the_processes_cannot_share_evenly_is_refused(root):
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
def test_a_process_sees_its_own_gpu_alone(monkeypatch, visible, local_rank, own):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    choose_own_gpu(local_rank)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own


def test_ranks_are_read_from_the_environment(monkeypatch):
    assert read_team() == Team(0, 1, 0, 1)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert read_team() == Team(5, 8, 1, 4) and not read_team().is_main


def test_a_leftover_rank_without_a_world_size_is_ignored(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert read_team() == Team()


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_an_empty_variable_is_none_and_one_that_is_no_number_is_one_line(monkeypatch, variable):
    monkeypatch.setenv(variable, " ")
    assert read_team() == Team() and variable not in os.environ
    for value in ("x", "-1", "1.5", "9" * 5000, "²"):
        monkeypatch.setenv(variable, value)
        with pytest.raises(UserError, match=f"^{variable}: "):
            read_team()


def test_a_wrong_flag_of_rank_1_alone_is_reported(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="--bogus: is not a flag"):
        train_qlora.parse_arguments(["--bogus"])
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    store = torch.distributed.HashStore()
    error = UserError("--bogus", None, "is not a flag", "see --help")
    assert str(processes._choose_ending(Team(1, 2, store=store), error)) == "rank 1: --bogus: is not a flag. See --help."
    follows = processes._choose_ending(Team(0, 2, store=store), SystemExit(2))
    assert type(follows) is SystemExit and follows.code == 2 and not capsys.readouterr().err


@pytest.mark.parametrize(
    "port, cause",
    [(None, "MASTER_PORT is missing"), ("99999", "MASTER_PORT is not a port"), ("29500", "MASTER_ADDR is missing")],
)
def test_a_world_size_without_a_launcher_is_one_error(monkeypatch, port, cause):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    if cause != "MASTER_ADDR is missing":
        monkeypatch.setenv("MASTER_ADDR", "localhost")
    if port:
        monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=f"WORLD_SIZE: 2: is set in the environment, but {cause}. Start with torchrun"):
        with connect(read_team()):
            pass


def test_shards_hold_every_item_and_gather_to_the_whole(monkeypatch):
    items = list("abcdefg")
    parts = [[part[at] for at in range(len(part))] for part in (Team(rank, 3).shard(items) for rank in range(3))]
    assert parts == [list("adg"), list("beg"), list("cfg")]  # as many in each
    team = Team(1, 3)
    monkeypatch.setattr(team, "gather", lambda own: parts)
    assert team.gather_in_order(parts[1])[: len(items)] == items


def test_each_row_goes_to_one_process_and_a_process_without_rows_trains_nothing():
    rows = [{"input_ids": torch.full((4,), n), "labels": torch.full((4,), n), "block": torch.tensor(n)} for n in range(3)]
    taken = [RankCollator(Team(rank, 3), 2)(rows) for rank in range(3)]
    assert [batch["block"].tolist() for batch in taken] == [[0, 1], [2], [-1]]
    assert (taken[2]["labels"] == IGNORED).all() and taken[1]["labels"].tolist() == [[2] * 4]


def test_a_setting_that_differs_between_processes_is_refused(monkeypatch):
    team = Team(1, 3)
    monkeypatch.setattr(team, "gather", lambda own: [{"lora.rank": "8"}, {"lora.rank": "8"}, {"lora.rank": "16"}])
    with pytest.raises(UserError, match=r"lora.rank: is 16 on rank 2 and 8 on rank 0"):
        check_identical(team, {"lora.rank": "8"})


def test_a_gpu_for_some_processes_only_is_refused(monkeypatch):
    team = Team(0, 3)
    monkeypatch.setattr(team, "gather", lambda own: [True, True, False])
    with pytest.raises(UserError, match=r"training\.device: has a GPU on rank 0 and none on rank 2"):
        processes.check_gpus(team)
