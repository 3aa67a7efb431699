"""training_curves.png: loss and learning rate, and below them speed and memory."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_kit.config import TrainingSettings
from qlora_kit.output.metrics import Entries, best_evaluation

# As dark as print needs, of different lightness, and with different lines and markers: the picture can do without colours.
TRAINING, EVALUATION, RATE, NORM, OTHER = "#1f5fa8", "#c2410c", "#15803d", "#9a9a9a", "#444444"


def scheduled_rates(settings: TrainingSettings, steps: int) -> list[float]:
    """Return the learning rate of each step of a run, as the libraries' schedules compute it."""
    warmup = 0 if settings.lr_scheduler == "constant" else settings.warmup_steps(steps)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        share = (step - warmup) / max(1, steps - warmup)
        return {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share}.get(settings.lr_scheduler, 1.0)

    return [settings.learning_rate * factor(step) for step in range(steps)]


def plot_training_curves(metrics: Entries, path: Path, title: str = "", rates: Sequence[float] = ()) -> None:
    """Draw the metrics of a run to a PNG file: left the losses, right the learning rate, below them speed and memory.

    Args:
        metrics: objects of metrics.jsonl, with `step`, and `loss` and `learning_rate` or `eval_loss`.
        rates: the scheduled learning rate of each step; without, the logged ones are joined.
    """
    os.environ["MPLBACKEND"] = "Agg"  # one that matplotlib does not know would end its import
    import matplotlib

    matplotlib.use("Agg")  # works without a screen
    import matplotlib.pyplot as plt

    below = [key for key in ("tokens_per_second", "memory_gib") if any(entry.get(key) is not None for entry in metrics)]
    rows: Any = [["loss", "rate"], [below[0], below[-1]]] if below else [["loss", "rate"]]
    last = max((entry["step"] for entry in metrics), default=1)
    sizes: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}
    with plt.rc_context(sizes):
        figure, panels = plt.subplot_mosaic(rows, figsize=(10, 5.6), height_ratios=[3, 1][: len(rows)], layout="constrained")
        try:
            figure.suptitle(title, fontsize=11)
            _draw_losses(panels["loss"], metrics)
            _draw_rates(panels["rate"], metrics, rates)
            labels = {"tokens_per_second": "tokens/s", "memory_gib": "memory (GiB)"}
            for key in below:
                steps, values = _points(metrics, key)
                panels[key].plot(steps, values, color=OTHER, linewidth=1.2)
                panels[key].set(ylabel=labels[key], xlabel="optimizer step", ylim=(0, 1.15 * max(values) or 1))
                panels[key].yaxis.set_major_formatter("{x:,.9g}")
            for axes in panels.values():
                axes.set_xlim(-0.02 * last, 1.03 * last)
            figure.savefig(path, dpi=150)
        finally:
            plt.close(figure)


def _points(metrics: Entries, key: str) -> tuple[list[int], list[float]]:
    entries = [entry for entry in metrics if entry.get(key) is not None]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def _draw_losses(axes: Any, metrics: Entries) -> None:
    """Draw training and held-out loss, each held-out one with its standard error, the base model's and the best one marked."""
    steps, losses = _points(metrics, "loss")
    evaluations = [entry for entry in metrics if entry.get("eval_loss") is not None]
    trained, base = [[e for e in evaluations if (e["step"] > 0) is later] for later in (True, False)]
    axes.plot(steps, losses, color=TRAINING, linewidth=1.4, label="training")
    if base:
        loss = base[0]["eval_loss"]
        axes.axhline(loss, color=OTHER, linestyle="--", linewidth=1.2, label=f"base model ({_perplexity(loss)})")
    if trained:
        errors = [(entry.get("eval_standard_error") or 0) / (entry.get("eval_perplexity") or 1) for entry in trained]
        points = ([entry["step"] for entry in trained], [entry["eval_loss"] for entry in trained])
        axes.errorbar(*points, errors, color=EVALUATION, fmt="o--", markersize=4, linewidth=1.2, capsize=3, label="evaluation")
    if best := best_evaluation(metrics):
        label = f"best: step {best['step']} ({_perplexity(best['eval_loss'])})"
        axes.plot(best["step"], best["eval_loss"], "*", color=EVALUATION, markeredgecolor="black", markersize=13, label=label)
    axes.set(title="Loss", xlabel="optimizer step", ylabel="mean loss (nats per token)")
    axes.legend()
    perplexity = axes.secondary_yaxis("right")
    perplexity.set_ylabel("perplexity")
    low, high = axes.get_ylim()
    marks = [digit * 10.0**power for power in range(-1, 9) for digit in (1, 2, 5)]
    marks = [mark for mark in marks if low <= math.log(mark) <= high]
    perplexity.set_yticks([math.log(mark) for mark in marks], [f"{mark:,.9g}" for mark in marks])


def _perplexity(loss: float) -> str:
    return f"perplexity {math.exp(min(loss, 700)):.4g}"


def _draw_rates(axes: Any, metrics: Entries, rates: Sequence[float]) -> None:
    """Draw the learning rate as scheduled, up to the last logged step, and the gradient norm on an axis of its own."""
    last = max((entry["step"] for entry in metrics), default=0)
    shown = (range(1, last + 1), rates[:last]) if len(rates) >= last else _points(metrics, "learning_rate")
    steps, norms = _points(metrics, "grad_norm")
    right = axes.twinx()
    right.plot(steps, norms, ":", color=NORM, linewidth=1.5, label="gradient norm")
    right.set(ylabel="gradient norm, before clipping", ylim=(0, None))
    right.grid(False)
    axes.plot(*shown, color=RATE, linewidth=1.6, label="learning rate")
    axes.set(title="Learning rate", xlabel="optimizer step", ylabel="learning rate", zorder=right.get_zorder() + 1)
    axes.set_frame_on(False)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    handles = [*axes.get_lines(), *(right.get_lines() if norms else [])]
    axes.legend(handles, [str(line.get_label()) for line in handles])
