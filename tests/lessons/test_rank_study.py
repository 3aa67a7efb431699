"""Test the lesson of ranks: errors of low-rank copies by hand and by numpy's SVD, and LoRA trained to reach them."""

import numpy as np
import pytest
import torch
from rich.cells import cell_len

from finetuning_lessons.layers import count_parameters
from finetuning_lessons.lesson import PRINTED_WIDTH, load_model
from finetuning_lessons.low_rank import best_errors, fitted_error, pooled_errors
from finetuning_lessons.rank_study import (
    LOSS,
    RUNS,
    STEPS,
    adapt,
    count_trained,
    draw,
    fine_tune_fully,
    load_base,
    print_costs,
    print_findings,
    print_losses,
)
from finetuning_lessons.seeds import load_results
from finetuning_lessons.short_run import load_split
from finetuning_lessons.words import choose


def test_best_error_by_hand():
    """Singular values 4, 2 and 1: beyond rank 1 remain 4 + 1 of 21, beyond rank 2 remains 1, beyond rank 3 nothing."""
    update = torch.diag(torch.tensor([2.0, -4.0, 1.0]))
    assert best_errors(update, (1, 2, 3)) == pytest.approx([(5 / 21) ** 0.5, (1 / 21) ** 0.5, 0])


def test_best_error_is_that_of_the_truncated_svd():
    update = np.random.default_rng(0).normal(size=(24, 40))
    left, values, right = np.linalg.svd(update, full_matrices=False)
    copied = (left[:, :5] * values[:5]) @ right[:5]
    expected = np.linalg.norm(update - copied) / np.linalg.norm(update)
    assert best_errors(torch.from_numpy(update), (5,)) == pytest.approx([expected])


def test_pooled_error_is_that_of_a_block_matrix_copied_block_by_block():
    """diag(3, 4) loses 3 at rank 1, diag(12, 0) nothing: sqrt(9 / (25 + 144))."""
    updates = [torch.diag(torch.tensor([3.0, 4.0])), torch.diag(torch.tensor([12.0, 0.0]))]
    assert pooled_errors(updates, (1,)) == pytest.approx([3 / 13])


@pytest.mark.parametrize("rank", [1, 4])
def test_a_trained_copy_comes_near_the_best_and_never_below(rank):
    update = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.linspace(3, 0.1, 48))
    (best,) = best_errors(update, (rank,))
    assert best - 1e-6 <= fitted_error(update, rank) < best + 0.01


def test_what_is_stored_is_printed_and_drawn(capsys, tmp_path):
    results = load_results("rank_study", {"steps": STEPS})
    one = results.measured[0]
    for language in ("zh-TW", "en"):
        choose(language)
        print_costs(one, results)
        print_losses(one, results, STEPS)
        print_findings(results)
    draw(tmp_path / "rank_study.png", one, results)
    lines = capsys.readouterr().out.splitlines()
    assert max(cell_len(line.rstrip()) for line in lines if not line.startswith("picture")) <= PRINTED_WIDTH
    printed = " ".join(" ".join(lines).split())
    assert " 8 12,288 2.08 % " in printed  # 8 · (768 + 768), of 768²
    assert f"attention only 122,880 3.5 % {one[LOSS]['attention only']:.3f} {results.of(LOSS, 'attention only'):.3f}" in printed
    gain = 6.39556 - results.of(LOSS, "rank 16").mean
    assert f"rank 16 {gain:.3f} ± " in printed and (tmp_path / "rank_study.png").exists()


def test_full_updates_are_those_of_the_42_projections():
    text = load_split()
    updates, loss = fine_tune_fully(text, steps=1)
    assert len(updates) == 6 * 7
    assert sorted({tuple(update.shape) for update in updates}) == [(64, 192), (192, 192), (192, 512), (512, 192)]
    # Adam's first step moves each weight by the learning rate, towards less loss.
    assert all(update.abs().max() == pytest.approx(5e-4, rel=0.05) for update in updates)
    assert loss < 6.4


def test_attention_at_rank_42_has_the_parameters_of_all_seven_at_rank_16():
    """A layer: 42 · 1280 and 16 · 3392 (in + out of its projections)."""
    (attention,) = (run for run in RUNS if run.name == "attention, rank 42")
    trainable = count_trained(attention, load_model())
    assert trainable == count_parameters(adapt(attention, 0))[0] == 6 * 42 * 1280
    assert trainable == pytest.approx(6 * 16 * 3392, rel=0.01)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_4_bit_base_differs_little_from_the_16_bit_one(kind):
    ids = torch.arange(64).view(1, 64)
    with torch.no_grad():
        plain, packed = (load_base(one)(input_ids=ids, labels=ids).loss for one in ("16-bit", kind))
    assert 0 < abs(plain - packed) < 0.5
    assert load_base("16-bit").dtype == load_model().dtype == torch.float32
