"""Read metrics.jsonl; find the best evaluation, and the evaluation at which a run begins to overfit."""

import json
from pathlib import Path
from typing import Any

from qlora_kit.output.folder import METRICS

Entries = list[dict[str, Any]]


def read_metrics(folder: Path) -> Entries:
    """Return the objects of metrics.jsonl in an output folder or a checkpoint."""
    with (folder / METRICS).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def best_evaluation(metrics: Entries) -> dict[str, Any] | None:
    """Return the first entry with the lowest evaluation loss of a trained adapter; None without an evaluation after step 0."""
    return min(_evaluations(metrics), key=lambda entry: entry["eval_loss"], default=None)


def first_overfitted(metrics: Entries) -> dict[str, Any] | None:
    """Return the first evaluation that overfits: worse than the best before by more than a standard error of the loss, while the
    training loss is lower.
    """
    evaluations = _evaluations(metrics)
    for number, entry in enumerate(evaluations[1:], 1):
        best = best_evaluation(evaluations[:number])
        if best is None or not best["eval_standard_error"]:  # a single block has none
            continue
        error = best["eval_standard_error"] / best["eval_perplexity"]  # of the loss
        before, now = (_training_loss(metrics, one["step"]) for one in (best, entry))
        if entry["eval_loss"] > best["eval_loss"] + error and before and now and now < before:
            return entry
    return None


def _evaluations(metrics: Entries) -> Entries:
    return [entry for entry in metrics if entry.get("eval_loss") is not None and entry["step"] > 0]


def _training_loss(metrics: Entries, step: int) -> float | None:
    """Return the last training loss that was logged up to a step."""
    losses = [entry["loss"] for entry in metrics if entry.get("loss") is not None and entry["step"] <= step]
    return losses[-1] if losses else None
