"""training_curves.png: the losses and the learning rate."""

from pathlib import Path
from typing import Any


def plot_training_curves(metrics: list[dict[str, Any]], path: Path) -> None:
    """Draw the losses (left) and the learning rate (right) of `metrics` to a PNG file.

    Args:
        metrics: objects of metrics.jsonl, with `step`, and `loss` and `learning_rate` or `eval_loss`.
    """
    import matplotlib

    matplotlib.use("Agg")  # works without a screen
    import matplotlib.pyplot as plt

    def draw(axes: Any, key: str, *form: str, **style: Any) -> None:
        entries = [entry for entry in metrics if key in entry]
        axes.plot([entry["step"] for entry in entries], [entry[key] for entry in entries], *form, **style)

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    draw(left, "loss", color="tab:blue", linewidth=1.2, label="training")
    if any("eval_loss" in entry for entry in metrics):
        draw(left, "eval_loss", "o-", color="tab:orange", label="evaluation")
    left.set(title="Loss", xlabel="optimizer step", ylabel="mean loss (nats per token)")
    left.legend()
    draw(right, "learning_rate", color="tab:green")
    right.set(title="Learning rate", xlabel="optimizer step", ylabel="learning rate")
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
