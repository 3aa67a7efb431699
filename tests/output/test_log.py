"""training_log.txt and metrics.jsonl."""

import json
import math

import pytest

from qlora_kit.model.perplexity import as_metrics, from_block_losses, recorded_base
from qlora_kit.output.folder import LOG, METRICS
from qlora_kit.output.log import RunLog
from qlora_kit.output.metrics import read_metrics


@pytest.fixture
def log() -> RunLog:
    return RunLog()


def test_lines_before_the_log_is_opened_are_written_when_it_opens(log, tmp_path, capsys):
    log.write("first")
    log.write_to_file("second")
    assert list(tmp_path.iterdir()) == []
    log.open(tmp_path, checkpoint=None)
    log.write("third ±")
    assert (tmp_path / LOG).read_text(encoding="utf-8") == "first\nsecond\nthird ±\n"
    shown = capsys.readouterr()
    assert shown.err == "first\nthird ±\n"
    assert shown.out == ""  # standard output is for results


def test_metrics_are_read_back_as_they_were_written(log, tmp_path):
    log.open(tmp_path, checkpoint=None)
    entries = [{"step": 0, "eval_loss": 3.5}, {"step": 1, "loss": 3.25, "learning_rate": 1e-5}]
    for entry in entries:
        log.write_metrics(entry)
    assert read_metrics(tmp_path) == entries
    assert len((tmp_path / METRICS).read_text().splitlines()) == 2


def test_a_new_run_does_not_append_to_the_files_of_a_failed_one(log, tmp_path):
    (tmp_path / LOG).write_text("old\n")
    (tmp_path / METRICS).write_text('{"step": 7, "loss": 1.0}\n')  # it would appear in the curves
    log.write("new")
    log.open(tmp_path, checkpoint=None)
    log.write_metrics({"step": 1, "loss": 3.0})
    assert (tmp_path / LOG).read_text() == "new\n"
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 3.0}]


def test_a_resumed_log_continues_that_of_the_checkpoint(log, tmp_path):
    """The files in the folder are ahead of the checkpoint, and may end with half a line."""
    out, checkpoint = tmp_path / "out", tmp_path / "checkpoint-2"
    out.mkdir()
    checkpoint.mkdir()
    log.open(out, checkpoint=None)
    log.write("step 1")
    log.write_metrics({"step": 1, "loss": 3.0})
    log.copy_to(checkpoint)
    log.write("step 2")
    (out / METRICS).write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    again = RunLog()
    again.write("again")
    again.open(out, checkpoint)
    again.write_metrics({"step": 2, "loss": 2.0})
    assert read_metrics(out) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    assert (out / LOG).read_text() == "step 1\nagain\n"


def test_nan_and_infinity_are_written_as_null(tmp_path):
    """A single evaluation block has no standard error; a resumed run reads the base model's perplexity from the log."""
    log = RunLog()
    log.open(tmp_path, None)
    log.write_metrics({"step": 0} | as_metrics(from_block_losses([12.0], [6])))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    entry = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert entry["eval_standard_error"] is None and entry["eval_loss"] == 2.0
    again = recorded_base([entry])
    assert again.loss == 2.0 and math.isnan(again.standard_error)
