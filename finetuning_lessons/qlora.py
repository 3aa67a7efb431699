"""QLoRA from scratch: a linear layer that stores W in NF4, with a LoRA update.

    python -m finetuning_lessons.qlora

QLoRA (arXiv 2305.14314), section 3. The lesson trains the embedded model with LoRA and with QLoRA on the same batches. It
measures the bytes stored, the bytes saved for the backward pass, and the loss after merging, for several seeds with --seeds.
16-bit arithmetic and fast kernels are left out.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetuning_lessons.layers import ALL_SEVEN, LoRALayer, replace_linear_layers
from finetuning_lessons.lesson import (
    BLUE,
    GREY,
    RED,
    SKY,
    begin,
    create_parser,
    finish,
    held_out_loss,
    load_model,
    picture,
    print_table,
    print_text,
    progress,
    train,
)
from finetuning_lessons.quantization import QuantizedWeight, quantize
from finetuning_lessons.seeds import Measured, Results, add_flag, measure_seeds, print_place, time_in_turns
from finetuning_lessons.short_run import load_split, use_one_thread
from finetuning_lessons.words import HELD_OUT_LOSS, LOSS, STEP, percent, text
from qlora_kit import cli
from qlora_kit.config import GIB
from qlora_kit.planning.shape import BYTES_4BIT_DOUBLE, read_shape

MIB = 2**20
STEPS = 20  # of 4 x 128 tokens
TIMED = 5  # steps of each kind
LOSSES, TIME = "held-out loss, nats a token", "forward and backward pass of 4 x 128 tokens, ms"
APART, MERGED, AGAIN, BEFORE = "QLoRA", "QLoRA, merged", "QLoRA, merged and packed again", "QLoRA, before"
SEVEN_BILLION = {  # from the config.json of Llama-2-7B
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
    "intermediate_size": 11008, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


class DequantizedProduct(torch.autograd.Function):
    """x Wᵀ for a packed W, which is dequantized in the forward pass and again in the backward pass.

    With `x @ weight.dequantize().T`, autograd would save the dequantized W of every layer until the backward pass, and the memory
    that packing saved would be lost. This function saves no tensor: W is frozen, so the backward pass does not need x either.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight) -> Tensor:
        ctx.weight = weight
        return x @ weight.dequantize().to(x.dtype).T  # (..., in) @ (in, out) -> (..., out)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad_output @ ctx.weight.dequantize().to(grad_output.dtype), None  # (..., out) @ (out, in) -> (..., in)


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight is stored in NF4 with double quantization: 4.127 bits per weight instead of 16.

    The packed weight stays on the device of `linear`; move that first.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.quantized = quantize(linear.weight.detach(), "nf4", double_quant=True)
        self.bias = linear.bias  # not packed: one number per row of W

    def forward(self, x: Tensor) -> Tensor:
        """Compute W x + b: (..., in) -> (..., out)."""
        y = DequantizedProduct.apply(x, self.quantized)
        return y if self.bias is None else y + self.bias


class QLoRALayer(LoRALayer):
    """y = doubleDequant(W) x + alpha/rank · B A x (section 3, equation 5): a LoRA layer that stores W in NF4."""

    linear: Any  # an NF4Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        linear: nn.Linear | None = None,
    ):
        super().__init__(in_features, out_features, rank, alpha, dropout, linear)
        self.linear = NF4Linear(self.linear)

    @property
    def weight(self) -> Tensor:
        """The dequantized W that the products use: (out, in)."""
        return self.linear.quantized.dequantize()

    @property
    def total_params(self) -> int:
        """Count W as well, which is packed two to a byte and is no nn.Parameter."""
        return super().total_params + self.weight.numel()

    def merge_weights(self) -> None:
        """Raise NotImplementedError: rounding W + ΔW to NF4 again would lose part of ΔW."""
        raise NotImplementedError("W is packed, and W + ΔW would have to be rounded to NF4 again; use merged_linear()")

    @torch.no_grad()
    def merged_linear(self) -> nn.Linear:
        """Return a plain layer with W + ΔW, where W is dequantized as in training and nothing is rounded to 4 bits again."""
        merged = nn.Linear(self.lora_A.in_features, self.lora_B.out_features, bias=False)
        merged.weight = nn.Parameter(self.weight + self.update(), requires_grad=False)  # (out, in)
        merged.bias = self.linear.bias
        return merged


# The lesson: the embedded model with LoRA and with QLoRA.


def stored_mib(model: nn.Module) -> dict[str, float]:
    """Return the MiB of each group of weights: A and B in fp32, other unpacked weights in the bfloat16 of the model's file."""
    stored = {"projections": 0.0, "embedding and norms": 0.0, "A and B": 0.0}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            stored["A and B"] += 4 * parameter.numel() / MIB
        else:
            part = "projections" if any(target in name for target in ALL_SEVEN) else "embedding and norms"
            stored[part] += 2 * parameter.numel() / MIB
    stored["projections"] += sum(m.quantized.nbytes for m in model.modules() if isinstance(m, NF4Linear)) / MIB
    return stored


class UnpackingLinear(NF4Linear):
    """An NF4Linear whose autograd saves the dequantized W: the mistake that DequantizedProduct avoids."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.quantized.dequantize().T


def saved_for_backward_mib(layer: nn.Module) -> float:
    """Return the MiB that autograd saves between the forward and the backward pass of 1024 -> 1024 features."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(256, 1024, requires_grad=True))
    return sum(kept.values()) / MIB


def copy_with_layers(model: nn.Module, make: Callable[[QLoRALayer], nn.Module]) -> nn.Module:
    """Copy the model and replace each QLoRA layer by `make(layer)`."""
    changed = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, QLoRALayer):
            parent, _, child = name.rpartition(".")
            setattr(changed.get_submodule(parent), child, make(layer))
    return changed


@dataclass(frozen=True)
class Run:
    """LoRA and QLoRA after training from the same A on the same batches: the models, and the loss of each step."""

    models: Mapping[str, nn.Module]
    curves: dict[str, list[float]]


def measure(seed: int, runs: list[Run]) -> Measured:
    """Train both with a seed, for A and the order of the blocks, and keep the run; measure losses and times."""
    blocks, models, curves, losses = load_split(seed), {}, {}, {}
    for name, layer_type in (("LoRA", LoRALayer), ("QLoRA", QLoRALayer)):
        progress(text(f"training {name}", f"訓練 {name}"))
        torch.manual_seed(seed)
        models[name] = load_model()
        replace_linear_layers(models[name], ALL_SEVEN, layer_type=layer_type)
        losses[f"{name}, before"] = held_out_loss(models[name], blocks.held_out)
        curves[name] = train(models[name], blocks.train, STEPS)
        losses[name] = held_out_loss(models[name], blocks.held_out)
    progress(text("merging the update, and packing it again", "合併更新，再重新壓縮"))
    losses |= {name: held_out_loss(merged, blocks.held_out) for name, merged in merge_both_ways(models["QLoRA"]).items()}
    runs.append(Run(models, curves))
    ids = blocks.train[:4]  # (4, T)
    steps = {name: lambda model=model: model(input_ids=ids, labels=ids).loss.backward() for name, model in models.items()}
    return {LOSSES: losses, TIME: time_in_turns(steps, TIMED)}


def merge_both_ways(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model with its update merged into unpacked weights, and with those packed to NF4 again."""
    return {
        MERGED: copy_with_layers(model, QLoRALayer.merged_linear),
        AGAIN: copy_with_layers(model, lambda layer: NF4Linear(layer.merged_linear())),
    }


def taken_back(one: Measured) -> float:
    """Return the share of what training gained that packing again takes back, in percent."""
    losses = one[LOSSES]
    return 100 * (losses[AGAIN] - losses[APART]) / (losses[BEFORE] - losses[APART])


def print_stored(stored: dict[str, dict[str, float]]) -> None:
    rows = [[name, *(f"{size:.2f}" for size in parts.values()), f"{sum(parts.values()):.2f}"] for name, parts in stored.items()]
    title = text(
        "Stored: LoRA beside 16-bit weights, QLoRA beside NF4 with double quantization",
        "儲存的大小：LoRA 用 16-bit 權重，QLoRA 用 NF4 加雙重量化",
    )
    header = text("MiB|projections|embedding and norms|A and B|sum", "MiB|投影層|embedding 與 norm|A 與 B|合計").split("|")
    print_table(title, header, rows)
    shape = read_shape(SEVEN_BILLION)
    assert shape is not None
    packed, rest = shape.projection_parameters() * BYTES_4BIT_DOUBLE / GIB, 2 * shape.embedding_parameters() / GIB
    both, decimal, half = packed + rest, (packed + rest) * GIB / 1e9, shape.parameters() / 2 / GIB
    print_text(
        text(
            f"Only projections are packed. Often quoted: a 7B model takes about 4 GB in NF4. By its shape Llama-2-7B takes "
            f"{packed:.2f} GiB for projections and {rest:.2f} for embedding and head, together {both:.2f} GiB, which are "
            f"{decimal:.2f} GB; half a byte a parameter would be {half:.2f} GiB.",
            f"只有投影層會被壓縮。常見的說法：7B 模型用 NF4 大約 4 GB。依 Llama-2-7B 的形狀計算，投影層 {packed:.2f} GiB，"
            f"embedding 與輸出層 {rest:.2f} GiB，合計 {both:.2f} GiB，也就是 {decimal:.2f} GB；"
            f"若每個參數半個 byte，會是 {half:.2f} GiB。",
        )
    )


def print_kept() -> None:
    linear = nn.Linear(1024, 1024, bias=False)
    layers = {"x @ weight.dequantize().T": UnpackingLinear(linear), "DequantizedProduct": NF4Linear(linear)}
    kept = [[name, f"{saved_for_backward_mib(layer):.2f}"] for name, layer in layers.items()]
    title = text("Kept for the backward pass of one layer, 1024 x 1024", "一層 1024 x 1024 為反向傳播保留的記憶體")
    print_table(title, [text("product", "乘法"), "MiB"], kept)


def print_training(one: Measured, results: Results) -> None:
    rows = []
    for name in ("LoRA", "QLoRA"):
        losses = [f"{one[LOSSES][key]:.3f}" for key in (f"{name}, before", name)]
        rows.append([name, *losses, f"{results.of(LOSSES, name):.3f}", results.median_range(TIME, name, 0)])
    header = ["", text("before", "訓練前"), text("after", "訓練後"), results.title(), text("pass, ms (range)", "一步 ms（範圍）")]
    title = text(
        f"Held-out loss of {STEPS} steps, rank 8 on all seven projections, nats a token",
        f"驗證損失（nats / token）：訓練 {STEPS} 步，七個投影層都用 rank 8",
    )
    print_table(title, header, rows)
    gap = results.gap(LOSSES, "QLoRA", "LoRA").compared("+.3f", " nats")
    slower = results.spread(lambda run: run[TIME]["QLoRA"] / run[TIME]["LoRA"]).median
    print_text(
        text(
            f"Held out, QLoRA ends {gap} from LoRA. Here its passes take {slower:.1f} times as long, since plain PyTorch "
            "unpacks each weight twice; fused kernels do it faster.",
            f"QLoRA 最後與 LoRA 的驗證損失相差 {gap}。這裡每一步要花 {slower:.1f} 倍的時間，因為純 PyTorch 每個權重要解開兩次；"
            "融合的 kernel 會快得多。",
        )
    )


def print_merged(one: Measured, results: Results) -> None:
    names = {
        APART: text("apart, as trained", "不合併，訓練時的樣子"),
        MERGED: text("merged into unpacked weights", "合併到解開的權重"),
        AGAIN: text("merged, then packed to NF4 again", "合併後再壓回 NF4"),
        BEFORE: text("update left out", "拿掉更新"),
    }
    rows = [[label, f"{one[LOSSES][name]:.4f}", f"{results.of(LOSSES, name):.4f}"] for name, label in names.items()]
    header = [text("weights", "權重"), text(*HELD_OUT_LOSS), results.title()]
    print_table(text("QLoRA's update merged", "合併 QLoRA 的更新"), header, rows)
    back = results.spread(taken_back).compared(".0f", text(" %", "%"))
    print_text(
        text(
            f"Packing W + ΔW to NF4 again takes back {back} of what training gained: merge into unpacked weights.",
            f"把 W + ΔW 再壓回 NF4，會失去訓練成果的 {back}：請合併到解開的權重。",
        )
    )


def draw(path: Path, stored: dict[str, dict[str, float]], curves: dict[str, list[float]], results: Results) -> None:
    with picture(path, columns=3, size=(16, 4.6)) as (left, middle, right):
        draw_stored(left, stored)
        for (name, losses), (colour, line) in zip(curves.items(), ((SKY, "-"), (BLUE, "--")), strict=True):
            middle.plot(range(1, len(losses) + 1), losses, line, color=colour, linewidth=2, label=name)
        gap = results.gap(LOSSES, "QLoRA", "LoRA").compared("+.3f")
        middle.set_title(text(f"Held out, QLoRA - LoRA: {gap}", f"驗證損失 QLoRA - LoRA：{gap}"))
        middle.set(xlabel=text(*STEP), ylabel=text(*LOSS))
        middle.xaxis.get_major_locator().set_params(integer=True)
        middle.legend()
        names = {
            text("left out", "拿掉"): BEFORE,
            text("packed again", "再壓回 NF4"): AGAIN,
            text("merged", "合併"): MERGED,
            text("apart", "不合併"): APART,
        }
        spreads = [results.of(LOSSES, name) for name in names.values()]
        means, errors = [spread.mean for spread in spreads], [spread.error for spread in spreads]
        right.errorbar(means, range(len(names)), xerr=errors, fmt="o", color=BLUE, capsize=5)
        right.set_yticks(range(len(names)), list(names))
        right.set_ylim(-0.5, len(names) - 0.5)
        right.set_xlabel(text(*HELD_OUT_LOSS) + f" (nats / token, {results.title()})")
        right.set_title(text(f"Merged: packing takes back {back_of(results)}", f"合併：再壓縮會失去 {back_of(results)}"))


def back_of(results: Results) -> str:
    return percent(results.spread(taken_back).mean)


def draw_stored(axes: Any, stored: dict[str, dict[str, float]]) -> None:
    parts = {
        "projections": (text("projections", "投影層"), BLUE),
        "embedding and norms": (text("embedding and norms", "embedding 與 norm"), GREY),
        "A and B": (text("A and B", "A 與 B"), RED),
    }
    bottom = [0.0] * len(stored)
    kinds = [text("LoRA, 16-bit weights", "LoRA，16-bit 權重"), text("QLoRA, NF4 weights", "QLoRA，NF4 權重")]
    for part, (label, colour) in parts.items():
        sizes = [sizes[part] for sizes in stored.values()]
        bars = axes.bar(kinds, sizes, 0.5, bottom=bottom, color=colour, label=label)
        axes.bar_label(bars, [f"{size:.2f}" for size in sizes], label_type="center", color="white")
        bottom = [below + size for below, size in zip(bottom, sizes, strict=True)]
    axes.set_title(text("The embedded model in memory", "內附模型占用的記憶體"))
    axes.set(ylabel=text("stored (MiB)", "儲存大小（MiB）"), ylim=(0, 1.25 * max(bottom)))
    axes.grid(axis="x", visible=False)
    axes.legend(ncols=3, loc="upper center", columnspacing=1, handlelength=1.2, fontsize=9)


def main(argv: list[str] | None = None) -> None:
    parser = create_parser(__doc__, "qlora")
    add_flag(parser)
    arguments = begin(parser, argv)
    use_one_thread()
    runs: list[Run] = []
    one, results = measure_seeds(arguments, lambda seed: measure(seed, runs), {"steps": STEPS})
    stored = {name: stored_mib(model) for name, model in runs[0].models.items()}
    print_stored(stored)
    print_kept()
    print_training(one, results)
    print_merged(one, results)
    print_place(one, results, LOSSES)
    draw(arguments.output_dir / "qlora.png", stored, runs[0].curves, results)
    finish(arguments)


if __name__ == "__main__":
    cli.run(main)
