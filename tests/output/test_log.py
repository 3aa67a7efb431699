"""What a run leaves to read, and the output folder that it is left in."""

import json
import math
import struct

import pytest
import torch

from qlora_kit.config import GIB, Config
from qlora_kit.config_file import load_config, override
from qlora_kit.errors import UserError
from qlora_kit.model.perplexity import as_metrics, from_block_losses, recorded_base
from qlora_kit.output.checkpoints import staged_checkpoint
from qlora_kit.output.curves import plot_training_curves, read_metrics
from qlora_kit.output.folder import CURVES, LOG, METRICS, check_output_dir
from qlora_kit.output.log import RunLog
from qlora_kit.output.provenance import write_provenance
from qlora_kit.planning.plan import Plan
from qlora_kit.training.machine import Machine
from qlora_kit.training.report import RunReport, open_output
from qlora_kit.training.resume import find_checkpoint

CPU = Machine("cpu", torch.float32, ["Device: cpu"])
ON_CPU = Plan(1, 0, {})


@pytest.fixture
def log() -> RunLog:
    return RunLog()


# The log


def test_nothing_is_written_before_the_log_is_opened_and_then_everything_in_order(log, tmp_path, capsys):
    log.line("first")
    log.file_only("second")
    assert list(tmp_path.iterdir()) == []
    log.open(tmp_path, checkpoint=None)
    log.line("third ±")
    assert (tmp_path / LOG).read_text(encoding="utf-8") == "first\nsecond\nthird ±\n"
    shown = capsys.readouterr()
    assert shown.err == "first\nthird ±\n"
    assert shown.out == ""  # standard output is for results


def test_metrics_read_back_as_they_were_written(log, tmp_path):
    log.open(tmp_path, checkpoint=None)
    entries = [{"step": 0, "eval_loss": 3.5}, {"step": 1, "loss": 3.25, "learning_rate": 1e-5}]
    for entry in entries:
        log.metrics(entry)
    assert read_metrics(tmp_path) == entries
    assert len((tmp_path / METRICS).read_text().splitlines()) == 2


def test_a_new_run_does_not_go_on_from_the_files_of_one_that_failed(log, tmp_path):
    (tmp_path / LOG).write_text("old\n")
    (tmp_path / METRICS).write_text('{"step": 7, "loss": 1.0}\n')  # it would be drawn into the curves
    log.line("new")
    log.open(tmp_path, checkpoint=None)
    log.metrics({"step": 1, "loss": 3.0})
    assert (tmp_path / LOG).read_text() == "new\n"
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 3.0}]


def test_a_resumed_log_is_that_of_the_checkpoint_and_then_goes_on(log, tmp_path):
    """Whatever the folder holds by then, half a line at its end included."""
    out, checkpoint = tmp_path / "out", tmp_path / "checkpoint-2"
    out.mkdir()
    checkpoint.mkdir()
    log.open(out, checkpoint=None)
    log.line("step 1")
    log.metrics({"step": 1, "loss": 3.0})
    log.copy_to(checkpoint)
    log.line("step 2")
    (out / METRICS).write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    again = RunLog()
    again.line("again")
    again.open(out, checkpoint)
    again.metrics({"step": 2, "loss": 2.0})
    assert read_metrics(out) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    assert (out / LOG).read_text() == "step 1\nagain\n"


def test_memory_is_neither_predicted_nor_measured_for_a_cpu(capsys):
    report = RunReport(Config(), CPU, ON_CPU)
    report.announce()
    report.memory("after loading")
    report.describe_path(None, "needs a CUDA GPU", "needs a CUDA GPU")
    told = capsys.readouterr().err
    assert "Device: cpu" in told and "Qwen/Qwen2.5-3B-Instruct" in told
    assert "Each optimizer step: 1 sequence at a time, 16 times; no layer computed again" in told
    assert "GiB" not in told


PLANNED = Plan(4, 12, {"projection weights": 1.25 * GIB, "libraries": 0.5 * GIB})


def test_how_micro_steps_run_and_what_they_will_take_is_told(capsys):
    report = RunReport(Config(), Machine("cuda", torch.bfloat16, [], 8.0 * GIB), PLANNED)
    report.describe_path(None, "needs Triton, which this torch lacks", None)
    told = capsys.readouterr().err
    assert "4 sequences at a time, 4 times; 12 layers computed again" in told
    assert "compiled: no, needs Triton, which this torch lacks; CUDA graphs: yes" in told
    assert "predicted at the peak: 1.75 GiB" in told


def test_the_librarys_layers_are_named_with_the_reason(capsys):
    report = RunReport(Config(), Machine("cuda", torch.bfloat16, [], 8.0 * GIB), PLANNED)
    report.describe_path("gpt2 is not built like Llama", "gpt2 is not built like Llama", "gpt2 is not built like Llama")
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line == "Each optimizer step: 4 sequences at a time, 4 times, through the library's layers (gpt2 is not built like Llama)"
    )
    assert report.predicted_gib is None  # it was of the fast path


def test_the_predicted_peak_stands_beside_the_measured_one(tmp_path, capsys, monkeypatch):
    measured = {"allocated": 1.0, "reserved": 1.5, "peak_allocated": 1.6, "peak_reserved": 1.8}
    monkeypatch.setattr(Machine, "memory_gib", lambda self: measured)
    (tmp_path / "adapter_model.safetensors").touch()
    report = RunReport(Config(), Machine("cuda", torch.bfloat16, [], 8.0 * GIB), PLANNED)
    report.summary(tmp_path, None, None, 7, 7)
    assert "peak 1.80 GiB reserved (predicted 1.75), 1.60 GiB allocated" in capsys.readouterr().err


def test_out_of_memory_in_mid_run_is_told_with_place_and_what_follows(capsys):
    report = RunReport(Config(), CPU, ON_CPU)
    report.out_of_memory("in step 7: starting it again", micro_batch=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Out of GPU memory in step 7:") and "2 sequences" in line and "the effective batch stays" in line
    assert report.micro_batch == 2


def test_an_early_end_names_the_step_that_was_kept(tmp_path, capsys):
    (tmp_path / "adapter_model.safetensors").touch()
    for last, kept in ((40, 40), (30, 20)):
        RunReport(Config(), CPU, ON_CPU).summary(tmp_path, None, None, last, kept)
        told = "the adapter is that of step 20, the best evaluated; training ended after step 30" in capsys.readouterr().err
        assert told == (kept < last)


# The curves

TRAINING = [{"step": step, "loss": 4 - step / 10, "learning_rate": 2e-4 * (1 - step / 20)} for step in range(1, 20)]
EVALUATION = [{"step": step, "eval_loss": 3.9 - step / 10} for step in (0, 10, 20)]


@pytest.mark.parametrize("metrics", [TRAINING, TRAINING + EVALUATION, TRAINING[:1]], ids=["training", "both", "one step"])
def test_the_curves_are_a_png_file(tmp_path, metrics):
    plot_training_curves(metrics, tmp_path / CURVES)
    data = (tmp_path / CURVES).read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 2 * height > 600  # two pictures side by side


def test_evaluations_are_drawn(tmp_path):
    plot_training_curves(TRAINING, tmp_path / "without.png")
    plot_training_curves(TRAINING + EVALUATION, tmp_path / "with.png")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


# The output folder


def finish(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").touch()


def write_checkpoint(folder, step: int):
    """Of a default run."""
    with staged_checkpoint(folder / "checkpoints", step, {}, needed=0) as staging:
        finish(staging)
        (staging / "config.yaml").write_text(Config().to_yaml())
    return folder / "checkpoints" / f"checkpoint-{step}"


def test_a_new_folder_may_be_written_and_is_not_yet_made(tmp_path):
    folder = tmp_path / "runs" / "one"
    assert check_output_dir(str(folder), overwrite=False, resume=False) == folder
    assert not folder.parent.exists()


def test_a_folder_with_other_files_may_be_written(tmp_path):
    (tmp_path / "notes.txt").touch()
    check_output_dir(str(tmp_path), overwrite=False, resume=False)


@pytest.mark.parametrize(("prepare", "what"), [(finish, "finished"), (lambda folder: write_checkpoint(folder, 5), "unfinished")])
def test_an_earlier_run_is_neither_replaced_nor_continued_unasked(tmp_path, prepare, what):
    prepare(tmp_path)
    with pytest.raises(UserError, match=rf"\b{what} .*--resume.*--overwrite.*--output_dir"):
        check_output_dir(str(tmp_path), overwrite=False, resume=False)
    check_output_dir(str(tmp_path), overwrite=True, resume=False)
    check_output_dir(str(tmp_path), overwrite=False, resume=True)
    assert any(tmp_path.iterdir())  # looking removes nothing


@pytest.mark.parametrize("below", ["", "runs/one"])
def test_a_file_in_the_way_is_named(tmp_path, below):
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match="taken is a file, not a folder"):
        check_output_dir(str(tmp_path / "taken" / below), overwrite=True, resume=False)


def test_a_folder_that_cannot_be_written_is_refused_by_its_nearest_existing_parent(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("os.access", lambda path, mode: asked.append(path))  # root may write anywhere: permissions cannot say no
    with pytest.raises(UserError, match=r"cannot be written; .*--output_dir"):
        check_output_dir(str(tmp_path / "runs" / "one"), overwrite=False, resume=False)
    assert asked == [tmp_path]


def test_overwriting_removes_the_run_and_nothing_else(tmp_path):
    finish(tmp_path)
    write_checkpoint(tmp_path, 5)
    for name in ("run.json", CURVES, "notes.txt"):
        (tmp_path / name).touch()
    config = override(Config(), {"lora.rank": 4})
    open_output(tmp_path, RunReport(config, CPU, ON_CPU), None, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", METRICS, "notes.txt", LOG]
    assert (tmp_path / METRICS).read_text() == (tmp_path / LOG).read_text() == ""  # begun afresh
    assert load_config(tmp_path / "config.yaml") == config


def test_the_provenance_is_written_whole_and_leaves_no_other_file(tmp_path):
    write_provenance(tmp_path, {"seed": 1, "command": "größer"})
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {"seed": 1, "command": "größer"}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


# Checkpoints


def found(folder, config: Config, wanted: str = ""):
    checkpoint, _ = find_checkpoint(folder, config, wanted)
    return checkpoint.folder


def test_the_newest_checkpoint_is_the_one_written_last(tmp_path):
    for step in (9, 10, 2):  # the run went on from an earlier step
        write_checkpoint(tmp_path, step)
    assert found(tmp_path, Config()).name == "checkpoint-2"


def test_the_checkpoint_named_is_taken(tmp_path):
    wanted = write_checkpoint(tmp_path, 9)
    write_checkpoint(tmp_path, 10)
    assert found(tmp_path, Config(), str(wanted)) == wanted


def test_a_checkpoint_of_a_run_elsewhere_is_not_taken(tmp_path):
    wanted = write_checkpoint(tmp_path / "one", 9)
    with pytest.raises(UserError, match=r"checkpoint-9: is no checkpoint of a run in .*other; .*--output_dir"):
        found(tmp_path / "other", Config(), str(wanted))


@pytest.mark.parametrize("wanted", ["", "nowhere/checkpoint-5"])
def test_without_a_checkpoint_there_is_one_problem(tmp_path, wanted):
    with pytest.raises(
        UserError, match=r"--resume: no checkpoint in .*(checkpoints|nowhere/checkpoint-5); start without --resume"
    ):
        found(tmp_path, Config(), wanted)


def test_a_changed_run_is_not_resumed_and_each_changed_key_is_named(tmp_path):
    write_checkpoint(tmp_path, 10)
    changed = {
        "lora.rank": 8,
        "data.max_length": 64,
        "training.learning_rate": 1e-4,
        "training.seed": 7,
        "performance.fused_lora": False,
    }
    allowed = {"training.num_epochs": 5, "performance.micro_batch": 4, "generation.top_k": 1}
    with pytest.raises(UserError) as caught:
        found(tmp_path, override(Config(), changed | allowed))
    assert {problem.partition(":")[0] for problem in caught.value.lines} == set(changed)
    assert any("lora.rank: 8: the run to resume has 16" in problem for problem in caught.value.lines)


def test_what_decides_nothing_may_change_when_resuming(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 10)
    changes = {"training.max_steps": 50, "training.save_steps": 5, "training.output_dir": "elsewhere", "generation.top_k": 1}
    assert found(tmp_path, override(Config(), changes)) == checkpoint


def test_a_number_that_does_not_exist_is_null_for_every_reader_of_json(tmp_path):
    """One evaluation block has no standard error; a resumed run reads its base model's perplexity from there."""
    log = RunLog()
    log.open(tmp_path, None)
    log.metrics({"step": 0} | as_metrics(from_block_losses([12.0], [6])))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    entry = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert entry["eval_standard_error"] is None and entry["eval_loss"] == 2.0
    again = recorded_base([entry])
    assert again.loss == 2.0 and math.isnan(again.standard_error)
