"""QLoRA from scratch: a linear layer that stores W in NF4, with a LoRA update.

    python -m finetuning_lessons.qlora

QLoRA (arXiv 2305.14314), section 3. The lesson trains the embedded model with LoRA and with QLoRA on the same batches. It
measures the bytes stored, the bytes saved for the backward pass, and the loss after merging. 16-bit arithmetic and fast kernels
are left out.
"""

import copy
import time
from collections.abc import Callable
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
    create_parser,
    held_out_loss,
    load_blocks,
    load_model,
    open_folder,
    picture,
    print_table,
    print_text,
    train,
)
from finetuning_lessons.quantization import QuantizedWeight, quantize
from qlora_kit import cli
from qlora_kit.config import GIB
from qlora_kit.planning.shape import BYTES_4BIT_DOUBLE, read_shape

MIB = 2**20
STEPS = 20
HELD_OUT = 16  # blocks of 128 tokens
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


def compare_training(blocks: Tensor) -> tuple[dict[str, Any], dict[str, list[float]], list[list[str]]]:
    """Train LoRA and QLoRA from the same A on the same batches.

    Returns:
        The models, the loss of each step, and the rows of a table.
    """
    models, curves, rows = {}, {}, []
    for name, layer_type in (("LoRA", LoRALayer), ("QLoRA", QLoRALayer)):
        torch.manual_seed(0)
        model = load_model()
        replace_linear_layers(model, ALL_SEVEN, layer_type=layer_type)
        before = held_out_loss(model, blocks[-HELD_OUT:])
        start = time.perf_counter()
        curves[name] = train(model, blocks[:-HELD_OUT], STEPS)
        seconds = (time.perf_counter() - start) / STEPS
        rows.append([name, f"{before:.3f}", f"{held_out_loss(model, blocks[-HELD_OUT:]):.3f}", f"{1000 * seconds:.0f} ms"])
        models[name] = model
    return models, curves, rows


def measure_merging_losses(model: nn.Module, held_out: Tensor) -> dict[str, float]:
    """Return the held-out loss of the model after each way of merging its update."""
    variants = {
        "apart, as trained": model,
        "merged into unpacked weights": copy_with_layers(model, QLoRALayer.merged_linear),
        "merged, then packed to NF4 again": copy_with_layers(model, lambda layer: NF4Linear(layer.merged_linear())),
        "update left out": copy_with_layers(model, lambda layer: layer.linear),
    }
    return {name: held_out_loss(variant, held_out) for name, variant in variants.items()}


def draw(path: Path, stored: dict[str, dict[str, float]], curves: dict[str, list[float]]) -> None:
    with picture(path, columns=2) as (left, right):
        bottom = [0.0] * len(stored)
        for part, colour in zip(stored["QLoRA"], (BLUE, GREY, RED), strict=True):
            sizes = [parts[part] for parts in stored.values()]
            bars = left.bar(["LoRA, 16-bit weights", "QLoRA, NF4 weights"], sizes, 0.5, bottom=bottom, color=colour, label=part)
            left.bar_label(bars, [f"{size:.2f}" for size in sizes], label_type="center", color="white")
            bottom = [below + size for below, size in zip(bottom, sizes, strict=True)]
        left.set(title="The embedded model in memory", ylabel="stored (MiB)", ylim=(0, 1.25 * max(bottom)))
        left.grid(axis="x", visible=False)
        left.legend(ncols=3, loc="upper center", columnspacing=1, handlelength=1.2)
        for (name, losses), (colour, line) in zip(curves.items(), ((SKY, "-"), (BLUE, "--")), strict=True):
            right.plot(range(1, len(losses) + 1), losses, line, color=colour, linewidth=2, label=name)
        right.set(title="Training on the same batches", xlabel="step", ylabel="loss (nats a token)")
        right.xaxis.get_major_locator().set_params(integer=True)
        right.legend()


def print_stored(stored: dict[str, dict[str, float]]) -> None:
    rows = [[name, *(f"{size:.2f}" for size in parts.values()), f"{sum(parts.values()):.2f}"] for name, parts in stored.items()]
    print_table(
        "Stored: LoRA beside 16-bit weights, QLoRA beside NF4 with double quantization", ["MiB", *stored["QLoRA"], "sum"], rows
    )
    shape = read_shape(SEVEN_BILLION)
    assert shape is not None
    packed, rest = shape.projection_parameters() * BYTES_4BIT_DOUBLE / GIB, 2 * shape.embedding_parameters() / GIB
    print_text(f"""Only projections are packed. Often quoted: a 7B model takes about 4 GB in NF4. By its shape Llama-2-7B takes
        {packed:.2f} GiB for projections and {rest:.2f} for embedding and head, together {packed + rest:.2f} GiB, which
        are {(packed + rest) * GIB / 1e9:.2f} GB; half a byte a parameter would be {shape.parameters() / 2 / GIB:.2f} GiB.""")


def print_merged(model: nn.Module, held_out: Tensor) -> None:
    losses = measure_merging_losses(model, held_out)
    print_table("QLoRA's update merged", ["weights", "held-out loss"], [[name, f"{loss:.4f}"] for name, loss in losses.items()])
    apart, _, again, without = losses.values()
    print_text(f"""Packing W + ΔW to NF4 again takes back {(again - apart) / (without - apart):.0%} of what training gained: merge
        into unpacked weights.""")


def main(argv: list[str] | None = None) -> None:
    folder = open_folder(create_parser(__doc__, "qlora").parse_args(argv).output_dir)
    blocks = load_blocks(128)
    models, curves, rows = compare_training(blocks)
    stored = {name: stored_mib(model) for name, model in models.items()}
    print_stored(stored)

    linear = nn.Linear(1024, 1024, bias=False)
    layers = {"x @ weight.dequantize().T": UnpackingLinear(linear), "DequantizedProduct": NF4Linear(linear)}
    kept = [[name, f"{saved_for_backward_mib(layer):.2f}"] for name, layer in layers.items()]
    print_table("Kept for the backward pass of one layer, 1024 x 1024", ["product", "MiB"], kept)

    header = ["", "held-out loss before", "after", "a step"]
    print_table(f"{STEPS} steps of rank 8 on all seven projections, nats a token", header, rows)
    print_merged(models["QLoRA"], blocks[-HELD_OUT:])
    draw(folder / "qlora.png", stored, curves)


if __name__ == "__main__":
    cli.run(main)
