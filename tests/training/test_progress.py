"""The last line of a terminal while a run trains."""

import io
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from qlora_kit.output.log import RunLog
from qlora_kit.training import progress
from qlora_kit.training.machine import Machine
from qlora_kit.training.progress import ProgressCallback, ProgressLine


def shown_in(width: int, line: ProgressLine) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    line.console = console
    console.print(line._render())
    return console.file.getvalue().splitlines()


@pytest.fixture
def line() -> ProgressLine:
    line = ProgressLine(Console(file=io.StringIO()), 52, 10, 4)
    line.done, line.epoch, line.loss, line.began = 22, 1.69, "loss 5.61 @20", line.began - 24
    return line


@pytest.mark.parametrize("width, facts", [
    (40, "42 % · 1:00 left · loss 5.61 @20"),
    (80, "42 % · 22/52 · epoch 2/4 · 0:24 · 1:00 left · loss 5.61 @20"),
    (200, "42 % · 22/52 · epoch 2/4 · 0:24 · 1:00 left · loss 5.61 @20"),
])  # fmt: skip
def test_the_line_fills_the_window_and_drops_what_matters_least(line, width, facts):
    """12 steps took 24 s, and 30 are left. Two columns stay free for ^C."""
    (shown,) = shown_in(width, line)
    assert re.sub(r"^(training )?[━╸╺ ]+", "", shown.rstrip()) == facts
    assert len(shown.rstrip()) == width - 2


def test_an_evaluation_takes_the_line_while_it_lasts(line):
    line.evaluated = (3, 18)
    (shown,) = shown_in(60, line)
    assert shown.startswith("evaluating ━") and shown.rstrip().endswith("16 % · 3/18")


def test_logged_steps_stay_on_the_screen_and_overfitting_is_said_once(monkeypatch, tmp_path, capsys):
    written = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **rest: Console(file=written, force_terminal=True, width=100))
    log = RunLog()
    log.open(tmp_path, None)
    callback = ProgressCallback(log, Machine("cpu", torch.float32, []), 256.0)
    state = SimpleNamespace(max_steps=40, global_step=0, num_train_epochs=2, epoch=0.0, log_history=[])
    callback.on_train_begin(None, state, None)
    for step, loss, held_out in ((10, 4.0, 4.0), (20, 3.0, 3.0), (30, 2.0, 3.5), (40, 1.0, 3.9)):
        state.global_step = step
        evaluated = {"eval_loss": held_out, "eval_perplexity": 2.0, "eval_standard_error": 0.2}
        for logs in ({"loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0}, evaluated):
            state.log_history.append({"step": step, **logs})
            callback.on_log(None, state, None, logs=logs)
    callback.close()
    text = (tmp_path / "training_log.txt").read_text()
    assert [line.partition(",")[0] for line in text.splitlines() if "/40" in line] == [
        f"step {step}/40: loss {loss:.4f}" for step, loss in ((10, 4), (20, 3), (30, 2), (40, 1))
    ]
    assert text.count("The run overfits: since step 20 the evaluation loss has risen") == 1
    shown = written.getvalue() + capsys.readouterr().err
    assert "step 40/40: loss 1.0000" in shown and "loss 1.00 @40" in shown
