"""Test the lesson of variants: the scales by hand and in peft, and what it says of stored results."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from rich.cells import cell_len

from finetuning_lessons import variants
from finetuning_lessons.lesson import PRINTED_WIDTH, load_blocks, load_model
from finetuning_lessons.seeds import load_results
from finetuning_lessons.variants import (
    ALPHA,
    BASE,
    LOSS,
    RANK,
    RATES,
    RULE_LOSS,
    RULES,
    STEPS,
    VARIANTS,
    best_rate,
    draw_rates,
    draw_rules,
    print_rules,
    print_variants,
    train_variant,
)
from finetuning_lessons.words import choose


def test_scales_by_hand():
    """alpha / rank of 32, 8 / sqrt(rank), and 2."""
    assert {name: [scale(rank) for rank in (4, 16, 64)] for name, scale in RULES.items()} == {
        "alpha fixed": [8, 2, 0.5],
        "rsLoRA": [4, 2, 1],
        "alpha = 2 rank": [2, 2, 2],
    }


def test_rslora_of_peft_has_four_times_the_scale_at_the_same_alpha():
    scales = {}
    for name in ("LoRA", "rsLoRA"):
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj"], task_type="CAUSAL_LM", **VARIANTS[name])
        model = get_peft_model(load_model(), config)
        scales[name] = {module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)}
    assert scales == {"LoRA": {2.0}, "rsLoRA": {8.0}}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_starts_from_the_base_model(name, monkeypatch, two_layers_dir):
    monkeypatch.setattr("finetuning_lessons.lesson.TINY_MODEL", two_layers_dir)
    blocks = load_blocks(64)[:2]
    with torch.no_grad():
        base = load_model()(input_ids=blocks, labels=blocks).loss.item()
    assert train_variant((blocks, blocks), 0, 0, 1e-3, 4, **VARIANTS[name]) == pytest.approx(base, abs=1e-4)


def test_what_is_stored_is_printed_and_drawn(capsys):
    from matplotlib.figure import Figure

    results = load_results("variants", {"steps": STEPS})
    one = results.measured[0]
    for language in ("zh-TW", "en"):
        choose(language)
        print_variants(results, one[LOSS][BASE], STEPS)
        print_rules(results)
    draw_rates(Figure().subplots(), one, results)
    draw_rules(Figure().subplots(), one, results)
    printed = capsys.readouterr().out
    assert max(cell_len(line.rstrip()) for line in printed.splitlines()) <= PRINTED_WIDTH
    lowest = min(results.of(LOSS, f"DoRA, {rate:g}").mean for rate in RATES)
    assert results.of(LOSS, f"DoRA, {best_rate(results, 'DoRA'):g}").mean == lowest
    fall = results.gap(RULE_LOSS, "alpha = 2 rank, 4", "alpha = 2 rank, 64")
    assert f"{fall:.3f} nats" in " ".join(printed.split())
    assert set(results.measured[0][LOSS]) - {BASE} == {f"{name}, {rate:g}" for name in variants.VARIANTS for rate in RATES}
