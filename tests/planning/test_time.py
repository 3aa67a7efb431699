"""Predicted times against measured micro-steps; cards by name."""

import pytest

from qlora_kit.config import Config
from qlora_kit.config_file import override
from qlora_kit.errors import UserError
from qlora_kit.planning.cards import CARDS, find_card
from qlora_kit.planning.plan import Plan
from qlora_kit.planning.shape import KNOWN_CONFIGS, read_shape
from qlora_kit.planning.time import predict_evaluation_seconds, predict_run_seconds, predict_step_seconds

SHAPE = read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"])


@pytest.mark.parametrize(
    ("card", "micro_batch", "recomputed", "tokens_per_second"),
    [
        ("H100", 4, 0, 30_882), ("H100", 16, 0, 34_580), ("H100", 1, 36, 14_863),
        ("H200", 4, 0, 31_905), ("H200", 16, 0, 35_882), ("H200", 1, 36, 15_927),
    ],
)  # fmt: skip
def test_the_prediction_is_close_to_the_measured_speed(card, micro_batch, recomputed, tokens_per_second):
    """The figures are of benchmarks/README.md and of its H100 runs; effective batch 16 x 512."""
    seconds = predict_step_seconds(SHAPE, Config(), Plan(micro_batch, recomputed, {}), CARDS[card])
    assert seconds == pytest.approx(8192 / tokens_per_second, rel=0.15)


def test_a_run_is_its_steps_and_its_evaluations():
    config, plan, card = override(Config(), {"training.num_epochs": 2, "training.eval_steps": 10}), Plan(4, 0, {}), CARDS["H100"]
    steps = 2 * 20  # 320 blocks, 16 a step
    expected = steps * predict_step_seconds(SHAPE, config, plan, card)
    assert predict_run_seconds(SHAPE, config, plan, card, blocks=320, evaluated=0) == pytest.approx(expected)
    with_evaluations = predict_run_seconds(SHAPE, config, plan, card, blocks=320, evaluated=8)
    assert with_evaluations - expected == pytest.approx(6 * predict_evaluation_seconds(SHAPE, config, 8, card))


def test_longer_texts_cost_more_a_token():
    def seconds_per_token(length):
        config = override(Config(), {"data.max_length": length})
        return predict_step_seconds(SHAPE, config, Plan(1, 0, {}), CARDS["H100"]) / length

    assert seconds_per_token(16_384) > 1.2 * seconds_per_token(4096)


@pytest.mark.parametrize("name", ["RTX 4060", "4060", "rtx4060", "RTX-4060", "NVIDIA GeForce RTX 4060"])
def test_a_card_is_found_by_its_usual_names(name):
    assert find_card(name).name == "RTX 4060"


def test_an_unknown_card_is_one_line_with_a_guess():
    with pytest.raises(UserError, match=r"--gpu: RTX 4061: is not in the table of cards \(did you mean RTX 4060\?\)"):
        find_card("RTX 4061")
