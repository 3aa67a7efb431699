"""The guard by itself: what it lets pass, what it says once, and what it remembers. In a real run: test_trainer.py."""

import json
import math

import numpy as np
import pytest
import torch

from qlora_kit.config import TrainingSettings
from qlora_kit.errors import Failed
from qlora_kit.training.step_guard import StepGuard, enumerate_numbers


class Facts:
    def __init__(self, silent):
        self.silent = list(silent)

    def describe_batch(self):
        return "block 7"

    def describe_checkpoints(self):
        return "checkpoint-1 stands"

    def modules_without_gradient(self):
        return self.silent


@pytest.fixture
def make_guard():
    def make(allowed=0, dtype="bfloat16", silent=("layers.0.q_proj",)):
        lines: list[str] = []
        guard = StepGuard(TrainingSettings(max_skipped_steps=allowed), dtype, lines.append, Facts(silent))
        guard.lines = lines
        return guard

    return make


def look(guard, step, loss=2.0, norm=0.5, smallest=0.1, loss_scale=None) -> bool:
    return guard.passes(step, *map(torch.tensor, (loss, norm, smallest)), loss_scale)


@pytest.mark.parametrize("values, what", [
    ({"loss": math.nan}, "the loss is nan"), ({"loss": math.inf}, "the loss is inf"),
    ({"norm": math.nan}, "the gradient norm is nan"), ({"norm": math.inf}, "the gradient norm is inf"),
])  # fmt: skip
def test_what_is_no_number_ends_the_run_in_one_line(make_guard, values, what):
    with pytest.raises(Failed) as failure:
        look(make_guard(), 12, **values)
    line = str(failure.value)
    assert line.startswith(f"{what} at step 12 (block 7, computed in bfloat16): ") and "\n" not in line
    for word in ("float32", "--learning_rate (now 0.0002)", "training.max_skipped_steps=1", "checkpoint-1 stands"):
        assert word in line


def test_as_many_steps_as_allowed_are_left_out_and_each_is_logged(make_guard):
    guard = make_guard(allowed=2)
    assert [look(guard, 1), look(guard, 2, loss=math.nan), look(guard, 3), look(guard, 4, norm=math.inf)] == [True, False] * 2
    assert guard.skipped == [2, 4] and guard.losses == [2.0, 2.0]
    assert [line.partition(" (")[0] for line in guard.lines] == [
        "warning: the loss is nan at step 2", "warning: the gradient norm is inf at step 4",
    ]  # fmt: skip
    assert all("block 7" in line for line in guard.lines)
    with pytest.raises(Failed, match=r"at step 5 .*training\.max_skipped_steps=3 skips the step"):
        look(guard, 5, loss=math.nan)


@pytest.mark.parametrize("dtype, remedy", [
    ("float16", "quantization.compute_dtype bfloat16 or float32"), ("bfloat16", "compute_dtype float32"), ("float32", None),
])  # fmt: skip
def test_the_advice_goes_by_the_dtype(make_guard, dtype, remedy):
    advice = make_guard(dtype=dtype).advice()
    assert (remedy in advice) if remedy else ("dtype" not in advice)


def test_what_float16s_loss_scaling_mends_is_left_to_it(make_guard):
    """It begins at 65,536 and halves at each overflow; below 1 there is nothing left to halve."""
    guard = make_guard(dtype="float16")
    assert look(guard, 1, norm=math.inf, loss_scale=lambda: 65536.0) and not guard.lines
    with pytest.raises(Failed):
        look(guard, 2, norm=math.inf, loss_scale=lambda: 0.5)
    with pytest.raises(Failed):
        look(guard, 2, loss=math.nan, loss_scale=lambda: 65536.0)


def test_a_jump_of_the_loss_is_told_once(make_guard):
    guard = make_guard()
    for step in range(1, 31):
        look(guard, step, loss=2.0 + 0.1 * (step % 3 - 1))  # median absolute deviation 0.1: ten robust deviations are 1.48
    assert look(guard, 31, loss=3.45) and not guard.lines
    assert look(guard, 32, loss=3.6) and look(guard, 33, loss=9.0)
    (line,) = guard.lines
    assert line.startswith("warning: the loss jumped to 3.6000 at step 32, from a median of ") and "block 7" in line


def test_a_steady_loss_may_rise_by_less_than_a_nat(make_guard):
    guard = make_guard()
    for step in range(1, 31):
        look(guard, step, loss=0.01)
    look(guard, 31, loss=1.0)
    assert not guard.lines
    look(guard, 32, loss=1.02)
    assert len(guard.lines) == 1


@pytest.mark.parametrize("shape", [2, 8, 32])
def test_scatter_is_no_jump(make_guard, shape):
    """Gamma distributed losses around 3 nats that fall by half, with a long tail to the right: 4 runs of 1,000 steps."""
    for seed in range(4):
        guard = make_guard()
        losses = np.random.default_rng(seed).gamma(shape, 3 / shape, 1000) * np.linspace(1, 0.5, 1000)
        for step, loss in enumerate(losses.tolist(), 1):
            look(guard, step, loss=loss)
        assert not guard.lines


def test_a_projection_without_gradient_is_told_once_after_the_first_steps(make_guard):
    guard = make_guard(silent=("layers.0.q_proj", "layers.1.q_proj"))
    for step in range(1, 6):
        assert look(guard, step, smallest=0.0)
        assert len(guard.lines) == (step > 2)
    assert "layers.0.q_proj and 1 more is exactly zero at step 3" in guard.lines[0]


def test_a_resumed_guard_knows_what_it_knew(make_guard):
    guard, again = make_guard(allowed=3), make_guard(allowed=3)
    for step in range(1, 40):
        look(guard, step, loss=math.nan if step == 5 else 1 / 3, smallest=0.0)
    again.restore(json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state() and again.skipped == [5] and len(again.losses) == 38
    for step in range(40, 70):
        assert look(guard, step, loss=1 / step) == look(again, step, loss=1 / step)
    assert again.state() == guard.state() and not again.lines


def test_records_are_counted_where_they_are_many():
    assert enumerate_numbers("record", [1234]) == "record 1,234" and enumerate_numbers("block", [1, 2]) == "blocks 1, 2"
    assert enumerate_numbers("record", range(1, 26)).endswith("19, 20 and 5 more")
