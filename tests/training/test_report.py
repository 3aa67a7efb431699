"""What a run tells its user, and how its output folder begins."""

import torch

from qlora_kit.config import GIB, Config
from qlora_kit.config_file import load_config, override
from qlora_kit.output.folder import CURVES, LOG, METRICS
from qlora_kit.planning.plan import Plan
from qlora_kit.training.machine import Machine
from qlora_kit.training.processes import ALONE
from qlora_kit.training.report import Run, RunReport, RunResult, open_output

CPU = Machine("cpu", torch.float32, ["Device: cpu"])
ON_CPU = Plan(1, 0, {})
GPU = Machine("cuda", torch.bfloat16, [], 8.0 * GIB)
PLANNED = Plan(4, 12, {"projection weights": 1.25 * GIB, "libraries": 0.5 * GIB})


def report_on(machine: Machine, plan: Plan = ON_CPU, config: Config | None = None) -> RunReport:
    return RunReport(Run(config or Config(), machine, plan, ALONE))


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
    for last, kept in ((40, 40), (30, 20)):
        report_on(CPU).summary(tmp_path, RunResult(tmp_path, kept, last, None, None))
        printed = "the adapter is that of step 20, the best evaluated; training ended after step 30" in capsys.readouterr().err
        assert printed == (kept < last)


def test_overwriting_removes_the_run_and_nothing_else(tmp_path):
    (tmp_path / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "run.json", CURVES, "notes.txt"):
        (tmp_path / name).touch()
    config = override(Config(), {"lora.rank": 4})
    open_output(tmp_path, report_on(CPU, config=config), None, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", METRICS, "notes.txt", LOG]
    assert (tmp_path / METRICS).read_text() == (tmp_path / LOG).read_text() == ""  # started anew
    assert load_config(tmp_path / "config.yaml") == config
