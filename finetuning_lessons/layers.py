"""LoRA from scratch: a linear layer with an update of low rank. Train it, merge it into the weights, unmerge it.

    python -m finetuning_lessons.layers

LoRA (arXiv 2106.09685). The lesson counts the trainable parameters of the embedded model, trains it for a few steps, measures
merging, and draws the singular values of the update. Attention is in attention.py, 4-bit weights are in qlora.py.
"""

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finetuning_lessons.lesson import (
    BLUE,
    GREY,
    ORANGE,
    begin,
    create_parser,
    finish,
    held_out_loss,
    load_blocks,
    load_model,
    picture,
    print_table,
    print_text,
    progress,
    train,
)
from finetuning_lessons.words import STEP, text
from qlora_kit import cli

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_SEVEN = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
STEPS = 20
HELD_OUT = 8  # blocks of 128 tokens
ROUNDS = 40  # forward passes that are timed


class LoRALayer(nn.Module):
    """y = W x + alpha/rank · B A x: W is frozen, only A and B are trained (section 4.1, equation 3).

    Args:
        rank: rows of A and columns of B; the update B A has at most this rank.
        alpha: the update is multiplied by alpha/rank, so that a change of rank needs less retuning (section 4.1).
        dropout: share of the inputs of A that is zeroed in training.
        linear: the layer to update, with its weight and bias; None creates one without bias.
    """

    # W before merging: subtracting an update does not restore floating-point numbers exactly. A buffer moves with the layer;
    # it is not persistent, so no checkpoint contains it.
    original_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        linear: nn.Linear | None = None,
    ):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank {rank}: should be 1 or more")
        self.linear = nn.Linear(in_features, out_features, bias=False) if linear is None else linear
        self.linear.requires_grad_(False)
        placed: dict[str, Any] = {"device": self.linear.weight.device, "dtype": self.linear.weight.dtype}
        self.lora_A = nn.Linear(in_features, rank, bias=False, **placed)  # weight (rank, in)
        self.lora_B = nn.Linear(rank, out_features, bias=False, **placed)  # weight (out, rank)
        self.dropout = nn.Dropout(dropout)
        self.rank, self.alpha, self.scaling = rank, alpha, alpha / rank
        # The paper draws A from a Gaussian; its code, and peft, take nn.Linear's own uniform distribution.
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)  # B A = 0: training starts from the base model exactly
        self.register_buffer("original_weight", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute W x + alpha/rank · B A x: (..., in) -> (..., out)."""
        if self.merged:
            return self.linear(x)
        update = self.lora_B(self.lora_A(self.dropout(x)))  # (..., in) -> (..., rank) -> (..., out)
        return self.linear(x) + self.scaling * update

    @property
    def merged(self) -> bool:
        return self.original_weight is not None

    def update(self) -> Tensor:
        """Return ΔW = alpha/rank · B A: (out, in)."""
        return self.scaling * (self.lora_B.weight @ self.lora_A.weight)  # (out, rank) @ (rank, in) -> (out, in)

    @torch.no_grad()
    def merge_weights(self) -> None:
        """Add ΔW to W, so that a forward pass costs no more than without LoRA (section 4.1). A second call changes nothing."""
        if self.merged:
            return
        self.original_weight = self.linear.weight.clone()
        self.linear.weight += self.update()

    @torch.no_grad()
    def unmerge_weights(self) -> None:
        """Restore W bit for bit. A second call changes nothing."""
        if self.original_weight is None:
            return
        self.linear.weight.copy_(self.original_weight)
        self.original_weight = None

    @property
    def trainable_params(self) -> int:
        return self.lora_A.weight.numel() + self.lora_B.weight.numel()  # rank · (in + out)

    @property
    def total_params(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def replace_linear_layers(
    model: nn.Module,
    targets: Sequence[str],
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    layer_type: type[LoRALayer] = LoRALayer,
) -> list[str]:
    """Replace each linear layer that `targets` names by a LoRA layer, and freeze everything else.

    Args:
        targets: last parts of module names: "q_proj" is that layer in every block. GPT-2's Conv1D is a linear layer as well.
        layer_type: the class of the new layers; qlora.py passes its own.

    Returns:
        Full names of the layers replaced.

    Raises:
        ValueError: a target names no linear layer.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.rpartition(".")[2] in targets
    }
    if missing := set(targets) - {name.rpartition(".")[2] for name in found}:
        raise ValueError(f"targets {sorted(missing)}: no such linear layer in this {type(model).__name__}")
    for name, parameter in model.named_parameters():
        if "lora_" not in name:  # A and B of an earlier call stay trainable
            parameter.requires_grad_(False)
    for name, module in found.items():
        linear = module if isinstance(module, nn.Linear) else _as_linear(module)
        layer = layer_type(linear.in_features, linear.out_features, rank, alpha, dropout, linear)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.train(module.training))
    return list(found)


def _as_linear(conv: Conv1D) -> nn.Linear:
    """View a Conv1D, x W + b with W (in, out), as an nn.Linear, x Wᵀ + b with W (out, in), without a copy."""
    in_features, out_features = conv.weight.shape
    linear = nn.Linear(in_features, out_features, device="meta")
    linear.weight, linear.bias = nn.Parameter(conv.weight.T), conv.bias
    return linear


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of trainable parameters, and of all."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


# The lesson: the embedded model with these layers.


def count_trainable() -> list[list[str]]:
    sets = {
        text("q and v", "q 和 v"): ("q_proj", "v_proj"),
        text("attention", "注意力"): ATTENTION,
        text("all seven projections", "七個投影層全部"): ALL_SEVEN,
    }
    rows = []
    for name, targets in sets.items():
        model = load_model()
        layers = replace_linear_layers(model, targets)
        trainable, total = count_parameters(model)
        rows.append([name, str(len(layers)), f"{trainable:,}", f"{total:,}", f"{100 * trainable / total:.2f} %"])
    return rows


def measure_start_gradients(model: nn.Module, blocks: Tensor) -> dict[str, float]:
    """Return the largest absolute gradient before the first step: of A, of B, and of all other parameters."""
    model(input_ids=blocks[:2], labels=blocks[:2]).loss.backward()
    largest = {"lora_A": 0.0, "lora_B": 0.0, "the rest": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            which = name.split(".")[-2] if "lora_" in name else "the rest"
            largest[which] = max(largest[which], parameter.grad.abs().max().item())
    model.zero_grad()
    return largest


def share_lost_by_subtraction(layers: list[LoRALayer], dtype: torch.dtype) -> float:
    """Return the share of weights for which (W + ΔW) - ΔW differs from W, every sum rounded to `dtype`."""
    changed = total = 0
    for layer in layers:
        weight, update = layer.linear.weight.to(dtype), layer.update().to(dtype)
        changed += int((weight + update - update != weight).sum())
        total += weight.numel()
    return changed / total


@torch.no_grad()
def time_forward(rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Return the CPU milliseconds of each variant's forward passes, which run in turns."""
    layer, merged, x = LoRALayer(1024, 1024), LoRALayer(1024, 1024), torch.randn(256, 1024)
    merged.merge_weights()
    variants = {"without": layer.linear, "beside": layer, "merged": merged}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            start = time.process_time()
            variant(x)
            times[name].append(1000 * (time.process_time() - start))
    return times


@torch.no_grad()
def compare_merged(model: nn.Module, layers: list[LoRALayer], blocks: Tensor) -> tuple[float, int]:
    """Return the largest change of a logit by merging all layers, and the number of weights that unmerging does not restore."""
    model.eval()
    weights = [layer.linear.weight.clone() for layer in layers]
    apart = model(input_ids=blocks[:2]).logits  # (2, T, vocabulary)
    for layer in layers:
        layer.merge_weights()
    merged = model(input_ids=blocks[:2]).logits
    for layer in layers:
        layer.unmerge_weights()
    changed = sum(int((layer.linear.weight != before).sum()) for layer, before in zip(layers, weights, strict=True))
    return (apart - merged).abs().max().item(), changed


def train_and_evaluate(model: nn.Module, blocks: Tensor) -> list[float]:
    """Train for STEPS steps; return the held-out loss before the first and after each."""
    held_out = blocks[-HELD_OUT:]
    losses = [held_out_loss(model, held_out)]
    train(model, blocks[:-HELD_OUT], STEPS, after_step=lambda: losses.append(held_out_loss(model, held_out)))
    return losses


def draw(path: Path, layer: LoRALayer, name: str, losses: list[float]) -> None:
    with picture(path, columns=2) as (left, right):
        left.plot(range(len(losses)), losses, "o-", color=BLUE)
        left.set_title(text("Only A and B of all seven projections train", "只訓練七個投影層的 A 和 B"))
        left.set(xlabel=text(*STEP), ylabel=text("held-out loss (nats a token)", "驗證損失（nats / token）"))
        left.xaxis.get_major_locator().set_params(integer=True)
        weight, update = (torch.linalg.svdvals(matrix.detach()) for matrix in (layer.linear.weight, layer.update()))
        right.semilogy(range(1, len(weight) + 1), weight, color=GREY, label=text("W, frozen", "W（凍結）"))
        learned = text("ΔW = alpha/rank · B A, learned", "ΔW = alpha/rank · B A（學到的）")
        right.semilogy(range(1, len(update) + 1), update, color=ORANGE, label=learned)
        rank = layer.lora_A.out_features
        right.axvline(rank, color=ORANGE, linestyle=":", linewidth=1)
        right.annotate(f"rank {rank}", (rank, 1e-3), xytext=(6, 0), textcoords="offset points")
        right.annotate(text("zero, but for rounding", "除了捨入誤差都是零"), (len(update) // 3, 1e-7))
        right.set_title(text(f"Singular values of {name}", f"{name} 的奇異值"))
        right.set(xlabel=text("number, largest first", "編號，由大到小"), ylabel=text("singular value", "奇異值"))
        right.set_ylim(bottom=1e-9)
        right.legend(loc="center right")


def print_merging(model: nn.Module, layers: list[LoRALayer], blocks: Tensor) -> None:
    difference, changed = compare_merged(model, layers, blocks)
    lost = {dtype: 100 * share_lost_by_subtraction(layers, dtype) for dtype in (torch.float32, torch.bfloat16)}
    rows = [
        [text("logits, merged against unmerged: largest difference", "合併前後 logits 的最大差距"), f"{difference:.1e}"],
        [
            text("weights not restored by subtracting ΔW in float32", "以 float32 減去 ΔW 還原不了的權重"),
            f"{lost[torch.float32]:.1f} %",
        ],
        [text("... in bfloat16", "⋯⋯以 bfloat16"), f"{lost[torch.bfloat16]:.1f} %"],
        [text("weights not restored by unmerge_weights", "unmerge_weights 還原不了的權重"), str(changed)],
    ]
    title = text(f"Merging the update into the weights, after {STEPS} steps", f"訓練 {STEPS} 步後，把更新合併進權重")
    print_table(title, [text("what", "項目"), text("measured", "實測")], rows)
    print_text(
        text(
            "Sums of floating-point numbers are rounded, so the way back is a copy of W, not a subtraction; and a second merge "
            "must not add ΔW again.",
            "浮點數的和會捨入，所以要還原就得留一份 W，不能用減的；重複合併也不能再加一次 ΔW。",
        )
    )


def print_times() -> None:
    times = time_forward()
    names = {
        "without": text("without LoRA", "沒有 LoRA"),
        "beside": text("A and B beside W", "A、B 在 W 旁邊"),
        "merged": text("merged", "合併後"),
    }
    rows, longer = [], {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        ratios = [100 * (a / b - 1) for a, b in zip(values, times["without"], strict=True)]  # of the same turn
        longer[name] = statistics.median(ratios)
        rows.append(
            [names[name], f"{middle:.2f}", f"{low:.2f} - {high:.2f}", "-" if name == "without" else f"{longer[name]:+.0f} %"]
        )
    count = len(times["without"])
    title = text(
        f"A forward pass of 256 x 1024, rank 8, in ms; {count} turns", f"256 x 1024 的前向傳播，rank 8，毫秒；{count} 輪"
    )
    header = ["", text("median", "中位數"), text("middle half", "中間一半"), text("over W alone", "比只有 W")]
    print_table(title, header, rows)
    print_text(
        text(
            f"A and B beside W take {longer['beside']:.0f} % longer. Merged, it is the same product as without LoRA; that the "
            f"median differs by {longer['merged']:+.0f} % shows how far to trust such a measurement.",
            f"A 和 B 放在 W 旁邊，時間多 {longer['beside']:.0f}%。合併後和沒有 LoRA 是同樣的矩陣乘法；中位數仍差 "
            f"{longer['merged']:+.0f}%，可見這種測量能信到什麼程度。",
        )
    )


def main(argv: list[str] | None = None) -> None:
    arguments = begin(create_parser(__doc__, "layers"), argv)
    torch.manual_seed(0)
    header = [
        text("rank 8 on", "rank 8 用在"),
        text("layers", "層數"),
        text("trained", "訓練參數"),
        text("all parameters", "全部參數"),
    ]
    title = text("What LoRA trains of the embedded model", "LoRA 訓練內建模型的哪些部分")
    print_table(title, [*header, text("share", "比例")], count_trainable())

    model, blocks = load_model(), load_blocks(128)
    names = replace_linear_layers(model, ALL_SEVEN)
    layers = [module for module in model.modules() if isinstance(module, LoRALayer)]
    largest = measure_start_gradients(model, blocks)
    rows = [[text(name, "其餘") if name == "the rest" else name, f"{value:.2e}"] for name, value in largest.items()]
    header = [text("gradient of", "誰的梯度"), text("largest", "最大值")]
    print_table(text("Before the first step", "第一步之前"), header, rows)
    print_text(
        text(
            "B is zero at the start, so the update is zero, and so is the gradient of A, which passes through B: B moves first. "
            "Nothing else has a gradient at all.",
            "B 一開始是零，所以更新是零；A 的梯度要經過 B，所以也是零：B 先動。其他參數完全沒有梯度。",
        )
    )
    progress(text("training", "訓練"))
    losses = train_and_evaluate(model, blocks)
    print_merging(model, layers, blocks)
    print_times()
    draw(arguments.output_dir / "layers.png", layers[0], names[0].removeprefix("model."), losses)
    finish(arguments)


if __name__ == "__main__":
    cli.run(main)
