"""What a run tells its user, and how its output folder begins."""

import pytest
import torch

from qlora_kit.config import GIB, Config
from qlora_kit.config_file import load_config, override
from qlora_kit.errors import Failed, Stopped
from qlora_kit.output.folder import CONFIG, METRICS
from qlora_kit.planning.plan import Plan
from qlora_kit.training.machine import Machine
from qlora_kit.training.processes import ALONE
from qlora_kit.training.report import Run, RunReport, RunResult, open_output
from tests.data.builders import text_blocks
from tests.library_schedule import library_rates
from tests.tiny_run import names

CPU = Machine("cpu", torch.float32, ["Device: cpu"])
ON_CPU = Plan(1, 0, {})
GPU = Machine("cuda", torch.bfloat16, [], 8.0 * GIB)
PLANNED = Plan(4, 12, {"projection weights": 1.25 * GIB, "libraries": 0.5 * GIB})


def report_on(machine: Machine, plan: Plan = ON_CPU, config: Config | None = None) -> RunReport:
    return RunReport(Run(config or Config(), machine, plan, ALONE))


def test_the_files_of_a_folder_are_reported_and_what_is_evaluated_and_trained_on_alike(tmp_path, capsys):
    for name in ("a.txt", "val.txt", "test.txt", "README.md"):
        (tmp_path / name).write_text(name)
    config = override(Config(), {"data.dataset": str(tmp_path), "data.eval_split": "validation"})
    text = text_blocks(range(100), 8, [10] * 10)
    report_on(CPU, config=config).describe_data(text, text.take(5))
    printed = capsys.readouterr().err
    for line in ("files: 1 (a.txt)", "eval files: 1 (val.txt)", "left out: 1 card (README.md); 1 of split test (test.txt)"):
        assert f"\n  {line}\n" in printed
    assert "  overlap: 4 of 4 evaluation documents are trained on, too" in printed


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(
    ("steps", "ratio"), [(5, 0.9), (5, 0.8), (5, 0.81), (1, 0.03), (2, 0.03), (100, 0.03), (10, 0.99), (3, 0)]
)
def test_a_warm_up_as_long_as_the_run_is_reported(capsys, scheduler, steps, ratio):
    """Compare with the highest rate of the library's schedule."""
    changes = {"lr_scheduler": scheduler, "warmup_ratio": ratio, "max_steps": steps, "learning_rate": 0.5}
    config = override(Config(), {f"training.{key}": value for key, value in changes.items()})
    report_on(CPU, config=config).describe_data(text_blocks(range(80), 8), None)
    printed = capsys.readouterr().err
    rates = library_rates(scheduler, steps, ratio)
    assert ("The warm-up takes" in printed) == (max(rates) < 0.5)
    assert f"rises to {max(rates):.3g} and does not reach training.learning_rate 0.5" in printed or max(rates) == 0.5


def test_no_gpu_memory_is_reported_on_a_cpu(capsys):
    report = report_on(CPU)
    report.announce([])
    report.memory("after loading")
    report.describe_path(None, "needs a CUDA GPU", "needs a CUDA GPU")
    printed = capsys.readouterr().err
    assert "Device: cpu" in printed and "Qwen/Qwen2.5-3B-Instruct" in printed
    assert "Each optimizer step: 1 sequence at a time, 16 times; no layer recomputed" in printed
    assert "GiB" not in printed


def test_the_division_into_micro_steps_and_the_predicted_memory_are_reported(capsys):
    report = report_on(GPU, PLANNED)
    report.describe_path(None, "needs Triton, which this torch lacks", None)
    printed = capsys.readouterr().err
    assert "4 sequences at a time, 4 times; 12 layers recomputed" in printed
    assert "compiled: no, needs Triton, which this torch lacks; CUDA graphs: yes" in printed
    assert "predicted at the peak: 1.75 GiB" in printed


def test_the_librarys_layers_are_reported_with_the_reason(capsys):
    report = report_on(GPU, PLANNED)
    report.describe_path("gpt2 is not built like Llama", "gpt2 is not built like Llama", "gpt2 is not built like Llama")
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line == "Each optimizer step: 4 sequences at a time, 4 times, through the library's layers (gpt2 is not built like Llama)"
    )
    assert report.predicted_gib is None  # it holds for the fast path only


def test_the_predicted_peak_is_printed_next_to_the_measured_one(tmp_path, capsys, monkeypatch):
    measured = {"allocated": 1.0, "reserved": 1.5, "peak_allocated": 1.6, "peak_reserved": 1.8}
    monkeypatch.setattr(Machine, "memory_gib", lambda self: measured)
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / METRICS).touch()
    report = report_on(GPU, PLANNED)
    report.summary(tmp_path, RunResult(tmp_path, 7, 7, None, None))
    assert "peak 1.80 GiB reserved (predicted 1.75), 1.60 GiB allocated" in capsys.readouterr().err


def test_out_of_memory_is_reported_with_the_step_and_the_consequence(capsys):
    report = report_on(CPU)
    report.out_of_memory("in step 7: starting it again", micro_batch=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Out of GPU memory in step 7:") and "2 sequences" in line and "the effective batch stays" in line


def test_after_an_early_end_the_step_of_the_adapter_is_reported(tmp_path, capsys):
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / METRICS).touch()
    for last, kept in ((40, 40), (30, 20)):
        report_on(CPU).summary(tmp_path, RunResult(tmp_path, kept, last, None, None))
        printed = "the adapter is that of step 20, the best evaluated; training ended after step 30" in capsys.readouterr().err
        assert printed == (kept < last)


def test_a_run_that_replaces_another_one_starts_beside_it_and_removes_what_an_unfinished_one_left_there(tmp_path):
    for folder in (tmp_path, tmp_path / ".new"):
        (folder / "checkpoints" / "checkpoint-5").mkdir(parents=True)
        (folder / "run.json").touch()
    report = report_on(CPU, config=override(Config(), {"lora.rank": 4}))
    open_output(tmp_path / ".new", report, None)
    assert names(tmp_path) == [".new", "checkpoints", "run.json"] and names(tmp_path / "checkpoints") == ["checkpoint-5"]
    assert names(tmp_path / ".new") == ["checkpoints", "config.yaml", "metrics.jsonl", "training_log.txt"]
    assert names(tmp_path / ".new" / "checkpoints") == [] and load_config(tmp_path / ".new" / CONFIG).lora.rank == 4


@pytest.mark.parametrize("error", [ValueError("'nonsense' is no backend\nof matplotlib"), OSError(28, "No space left on device")])
def test_curves_that_cannot_be_drawn_cost_a_line_and_nothing_else(tmp_path, error):
    report = report_on(CPU)
    report.log.open(tmp_path, None)
    report.log.settle(tmp_path)
    with report.noting_failure(tmp_path / "training_curves.png"):
        (tmp_path / "training_curves.png").write_bytes(b"half")
        raise error
    assert names(tmp_path) == ["metrics.jsonl", "training_log.txt"]
    (line,) = (tmp_path / "training_log.txt").read_text().splitlines()
    assert line.startswith(f"training_curves.png could not be drawn ({type(error).__name__}: ")


@pytest.mark.parametrize("ending, words", [
    (Stopped(130, "Stopped after step 2; everything is saved."), "Stopped after step 2; everything is saved."),
    (Failed("the loss is nan"), "ended without an adapter: the loss is nan"),
])  # fmt: skip
def test_the_log_ends_with_how_the_run_ended(tmp_path, ending, words):
    report = report_on(CPU)
    report.log.open(tmp_path, None)
    with pytest.raises(type(ending)), report.logging_failure():
        raise ending
    assert (tmp_path / "training_log.txt").read_text().splitlines()[-1].split("  ")[1] == words
