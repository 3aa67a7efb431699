"""Compare perplexities with numbers computed by hand, an independent jackknife, and transformers' own loss."""

import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.model.perplexity import (
    as_metrics,
    from_block_losses,
    library_losses,
    loss_difference,
    measure_block_losses,
    plus_minus,
    recorded_base,
)


def test_loss_is_the_mean_over_tokens_and_not_over_blocks():
    result = from_block_losses([6.0, 1.0], [2, 5])
    assert result.loss == pytest.approx(1.0)  # 7 nats / 7 tokens; the mean of the blocks' means would be 1.6
    assert result.perplexity == pytest.approx(math.e)
    assert (result.tokens, result.blocks) == (7, 2)


def test_standard_error_is_that_computed_by_hand():
    # loss 1; residuals 6 - 2 = 4 and 1 - 5 = -4; sqrt(2/1 * 32) = 8; 8 / 7 tokens
    assert from_block_losses([6.0, 1.0], [2, 5]).standard_error == pytest.approx(math.e * 8 / 7)


def test_the_standard_error_of_equal_blocks_is_that_of_their_means():
    sums = [21.0, 18.0, 30.0, 24.0, 12.0]
    expected = statistics.stdev(s / 10 for s in sums) / math.sqrt(5)
    result = from_block_losses(sums, [10] * 5)
    assert result.standard_error / result.perplexity == pytest.approx(expected)


def test_standard_error_agrees_with_the_jackknife():
    random = np.random.default_rng(0)
    counts = random.integers(50, 500, size=300)
    sums = counts * random.normal(3.0, 0.4, size=300)
    without_one = np.exp((sums.sum() - sums) / (counts.sum() - counts))  # the perplexity with each block left out in turn
    jackknife = math.sqrt(299 / 300 * ((without_one - without_one.mean()) ** 2).sum())
    assert from_block_losses(sums.tolist(), counts.tolist()).standard_error == pytest.approx(jackknife, rel=0.03)


def test_one_block_has_no_standard_error():
    result = from_block_losses([3.0], [3])
    assert math.isnan(result.standard_error) and str(result) == "2.718"
    assert "1 block of 4 tokens" in (definition := result.definition(4, "rows joined")) and "±" not in definition
    assert plus_minus(-0.5, math.nan, "+.4f") == "-0.5000" and plus_minus(0.5, 0.25, "+.4f") == "+0.5000 ± 0.2500"


def test_a_diverged_loss_does_not_overflow():
    result = from_block_losses([5000.0, 5000.0], [1, 1])
    assert result.loss == 5000 and math.isfinite(result.perplexity)


def test_the_difference_of_two_losses_is_that_computed_by_hand():
    # losses 7/7 and 7/7; block differences -2 and 2, residuals the same; sqrt(2/1 * 8) = 4; 4 / 7 tokens
    difference = loss_difference([6.0, 1.0], [4.0, 3.0], [2, 5])
    assert difference.loss == pytest.approx(0.0)
    assert difference.standard_error == pytest.approx(4 / 7)


def test_the_differences_error_is_that_of_paired_observations_if_blocks_are_equal():
    before, after = [21.0, 18.0, 30.0, 24.0, 12.0], [20.0, 16.0, 29.0, 21.0, 12.0]
    changes = [(b - a) / 10 for a, b in zip(before, after, strict=True)]
    difference = loss_difference(before, after, [10] * 5)
    assert difference.loss == pytest.approx(statistics.mean(changes))
    assert difference.standard_error == pytest.approx(statistics.stdev(changes) / math.sqrt(5))
    alone = [from_block_losses(sums, [10] * 5) for sums in (before, after)]  # unpaired errors are larger
    assert difference.standard_error < min(result.standard_error / result.perplexity for result in alone)


def measure_perplexity(losses_of, blocks, batch_size, **options):
    return from_block_losses(*measure_block_losses(losses_of, blocks, batch_size, **options))


@pytest.fixture(scope="module")
def model(tiny_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)


@pytest.fixture(scope="module")
def blocks():
    ids = torch.randint(0, 6000, (5, 24), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


@torch.no_grad()
def reference_loss(model, blocks) -> float:
    """Return transformers' own loss, block by block, weighted by predicted tokens."""
    total, tokens = 0.0, 0
    for block in blocks:
        predicted = int((block["labels"][1:] != -100).sum())
        total += predicted * model(input_ids=block["input_ids"][None], labels=block["labels"][None]).loss.item()
        tokens += predicted
    return total / tokens


def test_the_loss_is_that_of_transformers(model, blocks):
    result = measure_perplexity(library_losses(model), blocks, batch_size=2)
    assert result.loss == pytest.approx(reference_loss(model.eval(), blocks), rel=1e-5)
    assert (result.tokens, result.blocks) == (5 * 23, 5)  # no token predicts a block's first


@pytest.mark.parametrize("batch_size", [2, 5, 8])
def test_the_batch_size_does_not_matter(model, blocks, batch_size):
    one, many = (measure_perplexity(library_losses(model), blocks, size) for size in (1, batch_size))
    assert many.perplexity == pytest.approx(one.perplexity, rel=1e-5)
    assert many.standard_error == pytest.approx(one.standard_error, rel=1e-4)
    assert many.tokens == one.tokens


def test_masked_labels_add_neither_loss_nor_tokens(model, blocks):
    masked = [{"input_ids": block["input_ids"], "labels": block["labels"].clone()} for block in blocks]
    for number, block in enumerate(masked):
        block["labels"][: 4 * number + 1] = -100  # blocks of different weight
    result = measure_perplexity(library_losses(model), masked, batch_size=2)
    assert result.tokens == sum(23 - 4 * number for number in range(5))
    assert result.loss == pytest.approx(reference_loss(model.eval(), masked), rel=1e-5)


def test_the_forward_pass_runs_under_the_given_autocast(model, blocks):
    exact = measure_perplexity(library_losses(model), blocks, batch_size=2)
    autocast = torch.autocast("cpu", torch.bfloat16)
    rounded = measure_perplexity(library_losses(model, autocast), blocks, batch_size=2)
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)
    assert rounded.loss != exact.loss


class Uniform(torch.nn.Module):
    """A model that gives every next token the same probability and records its calls."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.vocabulary, self.batches, self.was_training = vocabulary, [], []

    def forward(self, input_ids, use_cache):
        self.batches.append(len(input_ids))
        self.was_training.append(self.training)
        return SimpleNamespace(logits=self.weight * torch.zeros(*input_ids.shape, self.vocabulary))


def test_a_uniform_models_perplexity_is_the_size_of_its_vocabulary(blocks):
    result = measure_perplexity(library_losses(Uniform(6144)), blocks, batch_size=2)
    assert result.perplexity == pytest.approx(6144)
    assert result.standard_error == pytest.approx(0, abs=1e-2)


def test_no_batch_is_larger_than_batch_size_and_progress_is_reported(blocks):
    model, done = Uniform(6144), []
    measure_perplexity(library_losses(model), blocks, batch_size=2, on_batch=done.append)
    assert model.batches == [2, 2, 1]
    assert done == [2, 4, 5]


@pytest.mark.parametrize("training", [True, False])
def test_measuring_runs_without_dropout_and_restores_the_mode(blocks, training):
    model = Uniform(6144).train(training)
    measure_perplexity(library_losses(model), blocks, batch_size=5)
    assert model.was_training == [False]
    assert model.training is training


def test_losses_may_overwrite_those_of_the_previous_batch(blocks):
    """A replayed CUDA graph does so; each batch must be summed before the next one runs."""
    buffer = torch.zeros(2, 23)

    def losses_of(ids, labels, starts):
        rows = buffer[: len(ids)]
        rows.copy_(ids[:, 1:] / 1000)
        return rows

    result = measure_perplexity(losses_of, blocks, batch_size=2)
    expected = sum(block["input_ids"][1:].double().sum().item() for block in blocks) / 1000
    assert result.loss * result.tokens == pytest.approx(expected, rel=1e-6)


def test_the_base_models_perplexity_reads_back_from_the_metrics_of_an_interrupted_run():
    before = from_block_losses([6.0, 1.0], [2, 5])
    written = [{"step": 0, "epoch": 0.0, **as_metrics(before)}, {"step": 5, **as_metrics(from_block_losses([1.0], [2]))}]
    assert recorded_base(written) == before
    assert recorded_base(written[1:]) is None
    assert recorded_base([]) is None
