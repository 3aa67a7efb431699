"""A resumed run is the uninterrupted one, byte for byte."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import train_qlora
from qlora_kit import cli
from qlora_kit.errors import Failed
from qlora_kit.fast.micro_step import MicroStep
from qlora_kit.output.checkpoints import find_newest_valid, list_checkpoints
from qlora_kit.training.checkpointing import move_state_to_paged_memory
from qlora_kit.training.trainer import QLoraTrainer
from tests.tiny_run import SMALL, log_steps, names, result


@pytest.fixture(autouse=True)
def in_the_repository(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.mark.parametrize("path, points", [
    (["--set", "performance.fused_lora=true"], (2, 3)),
    (["--set", "performance.fused_lora=false"], (5,)),  # its dropout draws from torch's generator
    (["--dataset", "samples/alpaca.jsonl"], (1,)),
], ids=["fast", "library", "packed"])  # fmt: skip
def test_a_run_resumed_from_any_step_equals_the_uninterrupted_one(tmp_path, path, points):
    """5 blocks in steps of 2, the last step of an epoch short: 7 steps are 2 1/3 epochs. Every third step is logged."""
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


def test_a_run_resumed_around_a_skipped_step_equals_the_uninterrupted_one(tmp_path, monkeypatch):
    """The loss of the third step of seven is NaN; every third step is logged. A resumed run keeps the count of skipped steps."""
    real, bad = MicroStep.train, [3]
    monkeypatch.setattr(MicroStep, "train", lambda micro, *rest: real(micro, *rest) * (math.nan if micro.step + 1 in bad else 1))
    whole = tmp_path / "whole"
    flags = [*SMALL, "--max_steps", "7", "--set", "training.save_steps=1", "--set", "training.logging_steps=3",
             "--set", "training.max_skipped_steps=1", "--set", "data.eval_split=null"]  # fmt: skip
    train_qlora.main([*flags, "--output_dir", str(whole)])
    expected = result(whole)
    assert [entry[0] for entry in expected[1]] == [1, 3, 6]  # the mean of steps 2 and 3 is the loss of step 2
    for step in (2, 3):  # before the skipped step, and right after it
        part = tmp_path / str(step)
        shutil.copytree(whole / "checkpoints" / f"checkpoint-{step}", part / "checkpoints" / f"checkpoint-{step}")
        train_qlora.main([*flags, "--output_dir", str(part), "--resume"])
        assert result(part) == expected, step
        assert (part / "training_log.txt").read_text().count("the step is skipped") == 1
    bad.append(6)
    again = [*flags, "--output_dir", str(part), "--resume", str(part / "checkpoints" / "checkpoint-5")]
    with pytest.raises(Failed, match=r"nan at step 6.*max_skipped_steps=2.*checkpoint-\d is complete"):
        train_qlora.main(again)
    train_qlora.main([*again, "--set", "training.max_skipped_steps=2"])
    assert "Changed since: training.max_skipped_steps: 2, was 1" in (part / "training_log.txt").read_text()
    assert json.loads((part / "run.json").read_text())["skipped_steps"] == [3, 6]


def test_a_run_whose_first_step_was_skipped_resumes_with_an_empty_optimizer(tmp_path, monkeypatch):
    """The skipped step would have been the only logged one."""
    real, out = MicroStep.train, tmp_path / "out"
    monkeypatch.setattr(MicroStep, "train", lambda micro, *rest: real(micro, *rest) * (math.nan if micro.step == 0 else 1))
    flags = [*SMALL, "--max_steps", "2", "--set", "training.save_steps=1", "--set", "training.max_skipped_steps=1",
             "--set", "data.eval_split=null", "--output_dir", str(out)]  # fmt: skip
    train_qlora.main(flags)
    before = result(out)
    train_qlora.main([*flags, "--resume", str(out / "checkpoints" / "checkpoint-1")])
    assert result(out) == before and before[1] == []


def test_a_resumed_run_keeps_the_patience_count_of_early_stopping(tmp_path):
    """At this learning rate no evaluation is better than the first: two more end the run, resumed or not."""
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


def test_a_disk_that_fills_up_in_a_run_ends_it_with_one_line(tmp_path, monkeypatch, capsys):
    questions, out = [], tmp_path / "out"

    def free(path):
        questions.append(path)
        return shutil._ntuple_diskusage(0, 0, 2**40 if len(questions) < 5 else 0)  # before the run, then at each of 4 steps

    monkeypatch.setattr(shutil, "disk_usage", free)
    with pytest.raises(SystemExit) as ending:
        flags = [*SMALL, "--max_steps", "4", "--set", "training.save_steps=1", "--output_dir", str(out)]
        cli.run(lambda: train_qlora.main(flags))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert ending.value.code == 1
    assert last.startswith("error: the checkpoint of step 4 cannot be written") and "checkpoint-3 is complete" in last
    assert find_newest_valid(list_checkpoints(out / "checkpoints"))[0].step == 3


def test_a_resumed_run_keeps_the_rows_that_an_earlier_lack_of_memory_left(tmp_path, monkeypatch):
    flags = [*SMALL, "--batch_size", "2", "--set", "training.save_steps=1", "--output_dir", str(tmp_path / "out")]
    state = QLoraTrainer._state
    monkeypatch.setattr(QLoraTrainer, "_state", lambda trainer: state(trainer) | {"rows": 1})
    train_qlora.main([*flags, "--max_steps", "1"])
    monkeypatch.undo()
    monkeypatch.chdir(Path(__file__).parents[2])
    train_qlora.main([*flags, "--max_steps", "2", "--resume"])
    assert json.loads((tmp_path / "out" / "run.json").read_text())["micro_batch"] == 1


def test_loaded_moments_are_moved_to_paged_memory(tmp_path):
    """With bitsandbytes' own optimizer; ordinary memory replaces that of a GPU."""
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
    assert move_state_to_paged_memory(loaded, allocate) == 2  # both moments of the large one
    assert all(loaded.state[large][name].is_paged for name in ("state1", "state2"))
    assert not any(getattr(value, "is_paged", False) for value in loaded.state[small].values())
    assert all(torch.equal(loaded.state[large][name], value) for name, value in before.items())
    assert {id(tensor) for tensor in loaded.page_mng.paged_tensors} == {id(loaded.state[large][n]) for n in ("state1", "state2")}
    assert move_state_to_paged_memory(loaded, allocate) == 0
    loaded.page_mng.paged_tensors.clear()
    plain = AdamW8bit([large])
    plain.load_state_dict({**plain.state_dict(), "state": {0: optimizer.state_dict()["state"][0]}})
    assert move_state_to_paged_memory(plain, allocate) == move_state_to_paged_memory(torch.optim.AdamW([large]), allocate) == 0
