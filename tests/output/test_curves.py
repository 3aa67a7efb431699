"""The picture of the losses and the learning rate."""

import struct

import pytest

from qlora_kit.output.curves import plot_training_curves
from qlora_kit.output.folder import CURVES

TRAINING = [{"step": step, "loss": 4 - step / 10, "learning_rate": 2e-4 * (1 - step / 20)} for step in range(1, 20)]
EVALUATION = [{"step": step, "eval_loss": 3.9 - step / 10} for step in (0, 10, 20)]


@pytest.mark.parametrize("metrics", [TRAINING, TRAINING + EVALUATION, TRAINING[:1]], ids=["training", "both", "one step"])
def test_the_curves_are_a_png_file_of_two_plots(tmp_path, metrics):
    plot_training_curves(metrics, tmp_path / CURVES)
    data = (tmp_path / CURVES).read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 2 * height > 600  # two plots side by side


def test_evaluations_are_drawn(tmp_path):
    plot_training_curves(TRAINING, tmp_path / "without.png")
    plot_training_curves(TRAINING + EVALUATION, tmp_path / "with.png")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()
