"""Runs that do not fit: which are refused, and the cheapest change that fits."""

from dataclasses import replace

import pytest

from qlora_kit.config import GIB, Config
from qlora_kit.config_file import override, parse_set
from qlora_kit.errors import UserError
from qlora_kit.planning.cards import CARDS
from qlora_kit.planning.fit import check_fit, describe_plan, plan_table, remedy
from qlora_kit.planning.plan import Plan, make_plan
from qlora_kit.planning.time import predict_run_seconds, predict_step_seconds

SAME_RESULT = {"performance.micro_batch", "training.gradient_checkpointing", "training.optim", "performance.offload_embedding"}
WIDE = {"lora.rank": 64, "data.max_length": 1024}
FIFTEEN = {"training.batch_size": 3, "training.gradient_accumulation_steps": 5}  # no power of two divides 15
ONE = {"training.batch_size": 1, "training.gradient_accumulation_steps": 1}
OFFLOADED = {"performance.offload_embedding": True, "training.optim": "adamw_torch"}
SHORT = {"data.max_length": 64, "training.gradient_accumulation_steps": 48}


def changes_of(advice: str) -> dict:
    """Return the keys and values of the flags in a remedy."""
    flags = advice.removeprefix("add ").removesuffix(", the cheapest change that fits")
    words = flags.replace("--rank ", "--set lora.rank=").replace("--max_length ", "--set data.max_length=").split()
    assert words[::2] == ["--set"] * (len(words) // 2)
    return parse_set(words[1::2])


@pytest.mark.parametrize(
    ("changes", "gib", "expected"),
    [
        # Only keys that change are named, and changes that leave the result the same come first.
        ({"performance.micro_batch": 16}, 2.6, "--set performance.micro_batch=auto"),
        ({"training.gradient_checkpointing": False}, 3, "--set training.gradient_checkpointing=auto"),
        ({"training.optim": "adamw_torch"}, 2.6, "--set training.optim=paged_adamw_32bit"),
        ({"training.optim": "adamw_8bit"}, 2.6, "--set training.optim=paged_adamw_8bit"),
        ({}, 2.4, "--set performance.offload_embedding=true"),
        ({"quantization.load_in_4bit": False}, 3, "--set quantization.load_in_4bit=true"),
        ({"quantization.compute_dtype": "float32"}, 3, "--set performance.offload_embedding=true"),
        (
            {"quantization.compute_dtype": "float32", "performance.offload_embedding": True},
            2.1,
            "--set quantization.compute_dtype=auto",
        ),
        ({"data.max_length": 4096}, 2.5, "--set performance.offload_embedding=true --max_length 2048"),
        ({}, 1.95, "--set performance.offload_embedding=true --max_length 256"),
        ({"lora.rank": 64, "data.max_length": 64}, 2.1, "--set performance.offload_embedding=true --rank 32"),
    ],
    ids=str,
)
def test_the_cheapest_change_that_fits(qwen_3b, changes, gib, expected):
    assert remedy(override(Config(), changes), qwen_3b, gib * GIB) == f"add {expected}, the cheapest change that fits"


@pytest.mark.parametrize(
    ("model", "changes", "gib"),
    [
        ("0.5B", {}, 0.5), ("0.5B", {}, 0.8), ("0.5B", WIDE, 0.8), ("0.5B", WIDE, 1.0), ("3B", {}, 2.0), ("3B", {}, 2.4),
        ("3B", WIDE, 3.0), ("3B", FIFTEEN, 2.0), ("3B", ONE, 2.4), ("3B", OFFLOADED, 2.0), ("3B", OFFLOADED, 2.2),
        ("3B", SHORT, 2.0), ("3B", {"lora.rank": 2}, 1.8), ("7B", {"lora.rank": 2}, 4.0),
    ],
    ids=str,
)  # fmt: skip
def test_a_remedy_that_leaves_the_result_the_same_fits(shapes, model, changes, gib):
    config, shape, limit = override(Config(), changes), shapes[model], gib * GIB
    assert make_plan(config, shape, limit).peak > limit
    remedied = changes_of(remedy(config, shape, limit))
    assert set(remedied) <= SAME_RESULT
    assert make_plan(override(config, remedied), shape, limit).peak <= limit


@pytest.mark.parametrize(
    ("model", "changes", "gib"),
    [
        ("0.5B", {}, 0.4), ("0.5B", WIDE, 0.7), ("3B", {}, 1.8), ("3B", WIDE, 1.8), ("3B", WIDE, 2.4), ("3B", OFFLOADED, 1.8),
        ("3B", SHORT, 1.7), ("3B", {"data.max_length": 32}, 1.8), ("7B", {}, 4.0), ("7B", OFFLOADED, 4.0), ("7B", SHORT, 4.0),
    ],
    ids=str,
)  # fmt: skip
def test_a_remedy_changes_the_result_only_when_nothing_else_fits_and_raises_no_setting(shapes, model, changes, gib):
    config, shape, limit = override(Config(), changes), shapes[model], gib * GIB
    same = override(config, {"performance.offload_embedding": True, "training.optim": "paged_adamw_32bit"})
    assert make_plan(same, shape, limit).peak > limit
    remedied = changes_of(remedy(config, shape, limit))
    assert set(remedied) - SAME_RESULT
    changed = override(config, remedied)
    assert make_plan(changed, shape, limit).peak <= limit
    assert changed.lora.rank <= config.lora.rank and changed.data.max_length <= config.data.max_length


@pytest.mark.parametrize(("model", "gib"), [("0.5B", 0.3), ("3B", 1.7), ("7B", 3.7)])
def test_a_model_that_no_setting_makes_fit_has_to_be_smaller(shapes, model, gib):
    advice = remedy(Config(), shapes[model], gib * GIB)
    assert advice == "use a smaller base model: no setting makes this one fit"


def refuse(config: Config, shape, gib: float) -> str:
    """Return the one problem of a run that cannot fit into `gib` GiB."""
    with pytest.raises(UserError) as refused:
        check_fit(make_plan(config, shape, gib * GIB), config, shape, gib * GIB)
    (line,) = refused.value.lines
    return line


def test_a_run_that_cannot_fit_is_one_line_with_key_value_and_remedy(qwen_3b):
    assert refuse(override(Config(), {"performance.vram_limit_gib": 2.2}), qwen_3b, 2.2) == (
        "performance.vram_limit_gib: 2.2: is too little for Qwen/Qwen2.5-3B-Instruct, which needs 2.58 GiB with these settings, "
        "1.33 for weights. Add --set performance.offload_embedding=true, the cheapest change that fits."
    )


def test_a_cap_below_the_size_of_the_weights_asks_for_a_smaller_model(qwen_3b):
    line = refuse(override(Config(), {"performance.vram_limit_gib": 1}), qwen_3b, 1.0)
    assert line.startswith("performance.vram_limit_gib: 1.0: ") and "Use a smaller base model: no setting" in line


@pytest.mark.parametrize("cap", [8, None])
def test_free_memory_is_named_where_it_is_less_than_the_cap(qwen_3b, cap):
    line = refuse(override(Config(), {"performance.vram_limit_gib": cap}), qwen_3b, 2.0)
    assert line.startswith("free GPU memory: 2.00 GiB: is too little for ")


def test_a_run_is_refused_only_more_than_8_percent_above_the_limit(qwen_3b):
    plan = make_plan(Config(), qwen_3b, 2.0 * GIB)
    check_fit(plan, Config(), qwen_3b, plan.peak / 1.079)
    with pytest.raises(UserError):
        check_fit(plan, Config(), qwen_3b, plan.peak / 1.081)
    check_fit(plan, Config(), qwen_3b, None)  # a CPU


@pytest.mark.parametrize("limit", [None, 8.0 * GIB])
def test_a_run_without_a_prediction_is_not_refused(qwen_3b, limit):
    check_fit(Plan(4, 0, {}), Config(), None, limit)
    check_fit(Plan(2, 36, {}), override(Config(), {"performance.fused_lora": False}), qwen_3b, limit)


def test_the_table_adds_up_and_names_the_plan(qwen_3b):
    config = override(Config(), {"performance.vram_limit_gib": 8})
    plan = make_plan(config, qwen_3b, 8 * GIB)
    title, parameters, *rows, verdict = plan_table(plan, config, qwen_3b, 8 * GIB, "performance.vram_limit_gib").splitlines()
    assert title == (
        f"Qwen/Qwen2.5-3B-Instruct: {plan.micro_batch} x {16 // plan.micro_batch} sequences of 512 tokens, rank 16, "
        f"{plan.recomputed} of 36 layers recomputed"
    )
    assert parameters == "  29,933,568 of 3,115,872,256 parameters are trained (0.96 %)"
    shown = {row[2:28].strip(): float(row[28:-4]) / (1024 if row.endswith(" MiB") else 1) for row in rows}
    parts = [name for name, size in plan.parts.items() if size]
    assert list(shown)[: len(parts)] == parts
    assert sum(shown[name] for name in parts) == pytest.approx(shown["sum: torch's allocator"], abs=0.05)
    assert shown["paged optimizer state"] == 57.1 / 1024  # 2 x 29,933,568 bytes
    assert verdict == f"Fits: {plan.peak / GIB:.2f} of 8.00 GiB (performance.vram_limit_gib)."


def test_the_state_of_an_optimizer_without_paging_is_counted_once(qwen_3b):
    config = override(Config(), {"training.optim": "adamw_8bit"})
    table = plan_table(make_plan(config, qwen_3b, 8 * GIB), config, qwen_3b, 8 * GIB, "a card")
    assert "optimizer state             57.1 MiB" in table and "paged optimizer state" not in table


def test_a_plan_for_a_named_card_says_how_long_it_takes(qwen_3b):
    card = replace(CARDS["RTX 4060"], memory=7.4 * GIB)
    *_, verdict, time = describe_plan(Config(), qwen_3b, card, 1, 2_400_000).splitlines()
    assert verdict.endswith("of 7.40 GiB (free on RTX 4060).")
    plan = make_plan(Config(), qwen_3b, 7.4 * GIB)
    step = predict_step_seconds(qwen_3b, Config(), plan, card)
    hours = predict_run_seconds(qwen_3b, Config(), plan, card, 4688, 256) / 3600
    assert time == (
        f"Time on RTX 4060, by arithmetic: {step:.2f} s an optimizer step, {8192 / step:,.0f} tokens/s; "
        f"about {hours:.1f} h for about 879 steps with evaluations."
    )


def test_a_plan_for_no_card_says_how_to_name_one(qwen_3b):
    config = override(Config(), {"performance.vram_limit_gib": 8})
    assert describe_plan(config, qwen_3b, None, 1, None).splitlines()[-1].endswith('such as --gpu "RTX 4060".')


def test_a_short_run_without_a_gpu_is_planned_for_the_cpu(qwen_3b, shapes):
    """0.5B: 4 x (357,826,560 + 151,936 x 896) operations a token, 37 billion a second."""
    short = {"training.max_steps": 10, "training.gradient_accumulation_steps": 2, "data.max_length": 256}
    title, memory, time = describe_plan(override(Config(), short), shapes["0.5B"], None, 1, None).splitlines()
    assert title.startswith("Qwen/Qwen2.5-3B-Instruct on the CPU: 1 x 2 sequences of 256 tokens") and "RAM (about)" in memory
    assert 5120 * 4 * (357_826_560 + 151_936 * 896) / 37e9 / 60 == pytest.approx(4.5, abs=0.1) and "about 5 min" in time
    insisted = override(Config(), {"training.device": "cpu"})
    assert "on the CPU" in describe_plan(insisted, qwen_3b, None, 1, 2_400_000).splitlines()[0]
    assert "a card of 8 GiB assumed" in describe_plan(Config(), qwen_3b, None, 1, 2_400_000)  # days on a CPU


def test_the_verdict_follows_the_limit(qwen_3b):
    plan = make_plan(Config(), qwen_3b, 2.5 * GIB)
    for limit, word in ((plan.peak, "Fits: "), (plan.peak - 1, "Does not fit: ")):
        assert plan_table(plan, Config(), qwen_3b, limit, "a card").splitlines()[-1].startswith(word)
