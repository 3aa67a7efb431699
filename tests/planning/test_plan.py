"""Plans: the fastest that fits, and the settings that decide it."""

import time
from dataclasses import replace
from itertools import pairwise

import pytest

from qlora_kit.config import GIB, Config
from qlora_kit.config_file import load_config, override
from qlora_kit.planning.memory import estimate_memory
from qlora_kit.planning.plan import (
    MICRO_STEP_TOKENS,
    RECOMPUTATION,
    Plan,
    make_plan,
    plan_inputs,
    resume_plan,
)
from qlora_kit.planning.shape import ModelShape

LIMITS = [1.0, 2.0, 2.8, 3.0, 4.0, 6.0, 7.2, 8.0, 12.0, 24.0, 80.0, 139.0]  # GiB
RUNS = [
    {},
    {"lora.rank": 64, "data.max_length": 1024},
    {"training.batch_size": 3, "training.gradient_accumulation_steps": 5},  # no power of two divides 15
    {"training.batch_size": 1, "training.gradient_accumulation_steps": 1},
    {"performance.offload_embedding": True, "training.optim": "adamw_torch"},
    {"data.max_length": 64, "training.gradient_accumulation_steps": 48},
]


@pytest.fixture(params=["3B", "0.5B", "7B"])
def shape(request, shapes) -> ModelShape:
    return shapes[request.param]


def cost(plan: Plan, config: Config, layers: int) -> float:
    """Return the predicted work per token that depends on the plan, in units of one token's work."""
    return MICRO_STEP_TOKENS / (plan.micro_batch * config.data.max_length) + RECOMPUTATION * plan.recomputed / layers


@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_a_plan_is_the_fastest_that_leaves_a_tenth_of_the_memory_free(shape, changes):
    config = override(Config(), changes)
    divisors = [n for n in range(1, config.effective_batch + 1) if config.effective_batch % n == 0]
    ways = [(b, n) for b in divisors for n in range(shape.layers + 1)]
    peaks = {way: sum(estimate_memory(shape, config, *way).values()) for way in ways}
    for gib in LIMITS:
        plan = make_plan(config, shape, gib * GIB)
        assert plan.peak == peaks[plan.micro_batch, plan.recomputed]  # the micro-batch divides the batch
        fitting = [way for way, peak in peaks.items() if peak <= 0.9 * gib * GIB]
        if not fitting:
            assert plan.peak == min(peaks.values())
            continue
        # No other way that fits has as large a micro-batch and as few recomputed layers.
        as_fast = [(b, n) for b, n in fitting if b >= plan.micro_batch and n <= plan.recomputed]
        assert as_fast == [(plan.micro_batch, plan.recomputed)]


@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_more_memory_never_makes_a_run_slower(shape, changes):
    config = override(Config(), changes)
    costs = [cost(make_plan(config, shape, gib * GIB), config, shape.layers) for gib in LIMITS]
    assert all(more <= less for less, more in pairwise(costs))


def test_with_enough_memory_the_effective_batch_is_one_micro_batch_and_nothing_is_recomputed(qwen_3b):
    plan = make_plan(Config(), qwen_3b, 139 * GIB)
    assert (plan.micro_batch, plan.recomputed) == (16, 0)


def test_the_default_run_fits_a_card_of_8_gib(qwen_3b):
    plan = make_plan(Config(), qwen_3b, 8 * GIB)
    assert 6.5 * GIB < plan.peak <= 7.2 * GIB


def test_a_micro_batch_and_checkpointing_that_are_set_are_kept(shape):
    for gib in LIMITS:
        plan = make_plan(override(Config(), {"performance.micro_batch": 4}), shape, gib * GIB)
        assert plan.micro_batch == 4
        for recompute, layers in ((True, shape.layers), (False, 0)):
            one = override(Config(), {"training.gradient_checkpointing": recompute})
            assert make_plan(one, shape, gib * GIB).recomputed == layers
            plan = make_plan(override(one, {"performance.micro_batch": 2}), shape, gib * GIB)
            assert (plan.micro_batch, plan.recomputed) == (2, layers)


@pytest.mark.parametrize("batch_size", [997, 65_521, 50_400])
def test_a_large_batch_is_divided_at_once(qwen_3b, batch_size):
    config = override(Config(), {"training.batch_size": batch_size, "training.gradient_accumulation_steps": 55_440})
    begun = time.monotonic()
    plan = make_plan(config, replace(qwen_3b, layers=512, hidden=64, mlp=64), 8 * GIB)
    assert config.effective_batch % plan.micro_batch == 0 and plan.peak <= 7.2 * GIB
    assert time.monotonic() - begun < 2  # with a try of each divisor and each number of layers: minutes


def test_less_memory_recomputes_more_layers_of_a_micro_batch_that_is_set(qwen_3b):
    config = override(Config(), {"performance.micro_batch": 8})
    layers = [make_plan(config, qwen_3b, gib * GIB).recomputed for gib in (3.5, 6, 9, 12, 80)]
    assert layers == sorted(layers, reverse=True) and layers[0] == 36 and layers[-1] == 0 and len(set(layers)) == 5


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (1, 0)),
        ({"training.batch_size": 4}, (4, 0)),
        ({"training.batch_size": 4, "performance.micro_batch": 2}, (2, 0)),
        ({"training.gradient_checkpointing": True}, (1, 36)),
        ({"training.gradient_checkpointing": False}, (1, 0)),
    ],
    ids=str,
)
def test_without_a_limit_the_micro_batch_is_the_batch_size(qwen_3b, changes, expected):
    plan = make_plan(override(Config(), changes), qwen_3b, None)  # a CPU
    assert (plan.micro_batch, plan.recomputed) == expected
    assert plan.parts == {} and plan.peak == 0


@pytest.mark.parametrize("limit", [None, 8.0 * GIB])
def test_without_a_shape_the_micro_batch_is_the_batch_size(limit):
    assert make_plan(override(Config(), {"training.batch_size": 4}), None, limit) == Plan(4, 0, {})


def test_the_librarys_layers_have_no_prediction(qwen_3b):
    config = override(Config(), {"performance.fused_lora": False, "training.batch_size": 2})
    assert make_plan(config, qwen_3b, 8 * GIB) == Plan(2, 36, {})  # recomputation on a GPU, as nothing is known of its memory


def test_a_resumed_run_keeps_its_plan_unless_the_settings_changed(root):
    tiny = root / "configs" / "tiny.yaml"
    config = load_config(tiny, {"training.batch_size": 8, "training.gradient_accumulation_steps": 1})
    before = {"micro_batch": 4, "recomputed": 3}
    now = Plan(8, 0, {})
    assert resume_plan(now, config, None, None, before, settings_unchanged=True) == Plan(4, 3, {})
    assert resume_plan(now, config, None, None, before, settings_unchanged=False) == now
    shape = ModelShape("qwen2", 6, 192, 6, 2, 32, 512, 6144, True)
    planned = Plan(8, 0, {"all": 1e6})
    assert resume_plan(planned, config, shape, 1e12, before, settings_unchanged=True).micro_batch == 4
    assert resume_plan(planned, config, shape, 1e3, before, settings_unchanged=True) == planned  # the old plan no longer fits
    other = load_config(tiny, {"performance.micro_batch": 2})
    assert plan_inputs(other) != plan_inputs(config)
    assert plan_inputs(config) == plan_inputs(load_config(tiny))
