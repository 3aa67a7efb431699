"""The best evaluation, and the one at which a run overfits."""

import pytest

from qlora_kit.output.metrics import best_evaluation, first_overfitted


def entries(losses: list[float], evaluations: list[float], error: float | None = 0.1) -> list[dict]:
    """Return a training loss and an evaluation of steps 10, 20, ..., whose perplexity of 2 has a standard error of 2 * error."""
    found = [{"step": 0, "eval_loss": 9.0, "eval_perplexity": 2.0, "eval_standard_error": error and 2 * error}]
    for step, (loss, evaluated) in enumerate(zip(losses, evaluations, strict=True), 1):
        found.append({"step": 10 * step, "loss": loss})
        found.append({**found[0], "step": 10 * step, "eval_loss": evaluated})
    return found


@pytest.mark.parametrize(
    ("losses", "evaluations", "best", "overfitted"),
    [
        ([4, 3, 2], [4, 3, 2.5], 30, None),
        ([4, 3, 2, 1], [4, 3, 3.05, 3.09], 20, None),  # within the standard error
        ([4, 3, 2, 1], [4, 3, 3.05, 3.2], 20, 40),
        ([4, 3, 2, 1], [4, 3, 3.5, 3.9], 20, 30),  # the first
        ([4, 3, 3.5, 3.6], [4, 3, 3.5, 3.9], 20, None),  # the training loss rises, too: it diverges
        ([4, 3], [8.5, 8.5], 10, None),  # of equal ones the first; the base model's is no adapter's
    ],
)
def test_overfitting_is_a_rise_beyond_the_standard_error_while_the_training_loss_falls(losses, evaluations, best, overfitted):
    metrics = entries(losses, evaluations)
    assert best_evaluation(metrics)["step"] == best
    found = first_overfitted(metrics)
    assert (found and found["step"]) == overfitted
    assert first_overfitted(entries(losses, evaluations, error=None)) is None  # a single block has no standard error


def test_without_an_evaluation_nothing_is_best():
    metrics = entries([], [])
    assert (best_evaluation(metrics), first_overfitted(metrics)) == (None, None)
