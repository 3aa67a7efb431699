"""The picture of a run: its size, what it draws, and the scheduled learning rates."""

import struct

import pytest

from qlora_kit.config import TrainingSettings
from qlora_kit.output.curves import plot_training_curves, scheduled_rates
from qlora_kit.output.folder import CURVES
from tests.library_schedule import library_rates

TRAINING = [
    {"step": step, "loss": 4 - step / 10, "learning_rate": 2e-4 * (1 - step / 20), "grad_norm": 1.0, "tokens_per_second": 900.0}
    for step in range(1, 20)
]
ON_GPU = [entry | {"memory_gib": 2.5} for entry in TRAINING]
EVALUATION = [
    {"step": step, "eval_loss": 3.9 - step / 10, "eval_perplexity": 20.0, "eval_standard_error": error}
    for step, error in ((0, 1.0), (10, None), (20, 1.0))
]


@pytest.mark.parametrize("metrics", [ON_GPU + EVALUATION, TRAINING[:1], []], ids=["all", "one step", "none"])
def test_the_curves_are_a_wide_png_file(tmp_path, metrics):
    plot_training_curves(metrics, tmp_path / CURVES, "model, data, date")
    data = (tmp_path / CURVES).read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (1500, 840)


def test_what_is_measured_is_drawn(tmp_path):
    drawn = set()
    for more, rates in (([], ()), (EVALUATION, ()), ([], [1e-4] * 20)):
        plot_training_curves(TRAINING + more, tmp_path / CURVES, "", rates)
        drawn.add((tmp_path / CURVES).read_bytes())
    assert len(drawn) == 3


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(("steps", "ratio"), [(52, 0.03), (1, 0.03), (5, 0.9), (10, 0.0)])
def test_scheduled_rates_are_those_of_the_library(scheduler, steps, ratio):
    rates = library_rates(scheduler, steps, ratio)
    settings = TrainingSettings(learning_rate=0.5, lr_scheduler=scheduler, warmup_ratio=ratio)
    assert scheduled_rates(settings, steps) == pytest.approx(rates)
