"""4-bit weights from scratch: NF4, FP4 and INT4, double quantization and packing; the bits and the error of each.

    python -m finetuning_lessons.quantization

QLoRA (arXiv 2305.14314), section 3. NF4 and FP4 agree with bitsandbytes bit for bit, except that its GPU kernel rounds some ties
of FP4 the other way. INT4 is evenly spaced. The lesson measures bits per weight, the error on normal random numbers and on the
embedded model, and that model's loss. Training is in qlora.py.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from finetuning_lessons.lesson import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    begin,
    create_parser,
    finish,
    load_blocks,
    load_model,
    picture,
    print_table,
    print_text,
    progress,
)
from finetuning_lessons.words import percent, text
from qlora_kit import cli

BLOCK = 64  # weights that share one absmax
GROUP = 256  # absmax values that share one scale, in double quantization
EVALUATED = 8  # blocks of 256 tokens that the loss is measured on


def nf4_levels() -> Tensor:
    """Return the 16 levels of 4-bit NormalFloat, from -1 to 1: (16,).

    They are quantiles of a normal distribution, so they are dense where weights are (section 3, equation 4). The outermost
    quantiles would be infinite, so the authors' code stops at a tail probability of (1/30 + 1/32) / 2. Zero must be a level,
    because zeros are common and must stay zero: 7 levels are below it and 8 above, each side evenly spaced in probability.
    """
    last = 0.9677083  # 1 - (1/30 + 1/32) / 2, with the digits of the authors' code
    sides = (torch.linspace(last, 0.5, 9)[:-1], torch.linspace(last, 0.5, 8)[:-1])  # (8,), (7,)
    above, below = (torch.special.ndtri(side.double()).float() for side in sides)  # fp32 misses the published table's last bits
    levels = torch.cat([-below, torch.zeros(1), above]).sort().values  # (16,)
    return levels / levels.max()


def fp4_levels() -> Tensor:
    """Return the levels of bitsandbytes' 4-bit floating point, in the order of their bit patterns: (16,).

    One bit of sign, two of exponent, one of mantissa. A larger exponent field is a smaller number, and the smallest level above
    zero is 1/192 of the largest.
    """
    positive = [0.0, 0.0625]  # exponent field 0
    for field in (1, 2, 3):
        power = 2.0 ** (4 - field)
        positive += [power, 1.5 * power]  # mantissa 0 and 1
    levels = torch.tensor([*positive, *(0.0 - level for level in positive)])  # a second 0, and no -0
    return levels / 12


def int4_levels() -> Tensor:
    """Return the integers from -7 to 7, divided by 7: (15,). The sixteenth code, -8, would exceed the absmax."""
    return torch.arange(-7, 8) / 7


LEVELS: dict[str, Callable[[], Tensor]] = {"nf4": nf4_levels, "fp4": fp4_levels, "int4": int4_levels}


def dynamic_levels() -> Tensor:
    """Return the levels of double quantization: seven decades, more levels in the larger ones (arXiv 1511.04561): (256,).

    QLoRA's text says 8-bit floats; bitsandbytes uses this table.
    """
    decades = []
    for decade in range(7):  # from 10^-6 with one level to 10^0 with 64
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6))
    positive = torch.cat(decades)  # (127,)
    return torch.cat([-positive, torch.zeros(1), positive, torch.ones(1)]).sort().values


def nearest_codes(values: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the level nearest to each value, of the lower level on a tie. Any shape -> the same shape, uint8."""
    levels = levels.to(values.device)
    order = torch.argsort(levels, stable=True)  # FP4's bit patterns are not in the order of their values
    ascending = levels[order]
    halfway = (ascending[:-1] + ascending[1:]) / 2
    return order[torch.bucketize(values, halfway)].to(torch.uint8)


def scale_blocks(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Divide each block of `size` values by its largest absolute value; zeros fill the last block.

    Returns:
        Values from -1 to 1: (blocks, size); the absmax of each block: (blocks,).
    """
    blocks = nn.functional.pad(values, (0, -len(values) % size)).view(-1, size)  # (n,) -> (blocks, size)
    absmax = blocks.abs().amax(dim=1)  # (blocks,)
    inverse = 1 / absmax.clamp(min=1e-38)  # avoids 1/0; a block of zeros stays zero
    return (blocks * inverse[:, None]).clamp(-1, 1), absmax


def pack(codes: Tensor) -> Tensor:
    """Pack two 4-bit codes into each byte, the first in the upper half: (n,) -> (n/2,) uint8."""
    return codes[0::2] << 4 | codes[1::2]


def unpack(packed: Tensor) -> Tensor:
    """Split each byte into its two 4-bit codes: (n/2,) -> (n,) uint8."""
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()


@dataclass(frozen=True)
class QuantizedAbsmax:
    """Double quantization: absmax values stored in 8 bits (section 3)."""

    codes: Tensor  # (blocks,) uint8
    scale: Tensor  # (blocks/256,) float32
    mean: Tensor  # () float32

    def dequantize(self) -> Tensor:
        """Return the absmax values: (blocks,) float32."""
        scale = self.scale.repeat_interleave(GROUP)[: len(self.codes)]  # (blocks/256,) -> (blocks,)
        return dynamic_levels().to(scale.device)[self.codes.int()] * scale + self.mean


def quantize_absmax(absmax: Tensor) -> QuantizedAbsmax:
    """Store each absmax in 8 bits: (blocks,) float32. All are positive; minus their mean, they use the levels of both signs."""
    mean = absmax.mean()
    scaled, scale = scale_blocks(absmax - mean, GROUP)  # (blocks,) -> (blocks/256, 256)
    if not absmax.is_cuda:
        scaled = round_to_grid(scaled)
    return QuantizedAbsmax(nearest_codes(scaled, dynamic_levels()).flatten()[: len(absmax)], scale, mean)


def round_to_grid(scaled: Tensor) -> Tensor:
    """Round to 65,536 points from -1 to 1, for which bitsandbytes' CPU kernel keeps a table of nearest levels."""
    return ((scaled + 1) * 0.5 * 65535 + 0.5).floor() / 65535 * 2 - 1


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight stored in 4 bits per entry."""

    kind: str
    packed: Tensor  # (n/2,) uint8
    absmax: Tensor | QuantizedAbsmax  # (n/64,) float32, or in 8 bits
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes stored for this weight alone, without the tables that all weights share."""
        if isinstance(self.absmax, Tensor):
            return self.packed.nbytes + self.absmax.nbytes
        return self.packed.nbytes + self.absmax.codes.nbytes + self.absmax.scale.nbytes + self.absmax.mean.nbytes

    def dequantize(self) -> Tensor:
        """Return the weight in its shape and dtype; each entry is one of 16 levels times the absmax of its block."""
        absmax = self.absmax if isinstance(self.absmax, Tensor) else self.absmax.dequantize()  # (n/64,)
        count = self.shape.numel()
        levels = LEVELS[self.kind]().to(absmax.device)
        values = levels[unpack(self.packed).int()][:count]  # (n/2,) -> (n,)
        return (values * absmax.repeat_interleave(BLOCK)[:count]).to(self.dtype).view(self.shape)


def quantize(weight: Tensor, kind: str = "nf4", double_quant: bool = False) -> QuantizedWeight:
    """Quantize a weight of any shape to 4 bits per entry, with one absmax for each 64 entries (section 2, equation 1).

    Args:
        kind: "nf4", "fp4" or "int4".
        double_quant: store the absmax values in 8 bits too.
    """
    scaled, absmax = scale_blocks(weight.flatten().float(), BLOCK)  # (n,) -> (n/64, 64), (n/64,)
    packed = pack(nearest_codes(scaled, LEVELS[kind]()).flatten())  # (n/64, 64) -> (n,) -> (n/2,)
    stored = quantize_absmax(absmax) if double_quant else absmax
    return QuantizedWeight(kind, packed[: (weight.numel() + 1) // 2], stored, weight.shape, weight.dtype)


# The lesson: bits and errors of the functions above.


def projection_weights(model: nn.Module) -> list[Tensor]:
    """Return the weights that QLoRA packs: those of every linear layer except the head."""
    return [m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]


def bits_per_weight(weights: list[Tensor], double_quant: bool) -> float:
    """Return the stored bits per weight, counted in the tensors that are stored."""
    stored = sum(quantize(weight, double_quant=double_quant).nbytes for weight in weights)
    return 8 * stored / sum(weight.numel() for weight in weights)


def relative_error(weights: list[Tensor], kind: str) -> float:
    """Return the RMS error of 4-bit weights, divided by the RMS of the weights."""
    wrong = sum((quantize(w, kind).dequantize() - w).square().sum().item() for w in weights)
    return math.sqrt(wrong / sum(weight.square().sum().item() for weight in weights))


@torch.no_grad()
def log_probabilities(model: nn.Module, blocks: Tensor) -> Tensor:
    """Return log probabilities of each next token: (blocks, T) -> (blocks, T - 1, vocabulary)."""
    return model(input_ids=blocks).logits[:, :-1].log_softmax(dim=-1)


@torch.no_grad()
def measure_damage(model: nn.Module, before: Tensor, kind: str, double_quant: bool, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Measure how storing the projections in 4 bits changes the log probabilities `before`, in nats per token.

    Returns:
        The change of the loss, and the Kullback-Leibler divergence from the model that is not quantized: (blocks,) each.
    """
    packed = copy.deepcopy(model)
    for weight in projection_weights(packed):
        weight.copy_(quantize(weight, kind, double_quant).dequantize())
    after = log_probabilities(packed, blocks)
    change = (before - after).gather(2, blocks[:, 1:, None]).squeeze(2)  # (blocks, T-1, vocabulary) -> (blocks, T-1)
    divergence = (before.exp() * (before - after)).sum(dim=2)  # (blocks, T-1)
    return change.mean(dim=1), divergence.mean(dim=1)


def draw(path: Path, weights: list[Tensor], errors: dict[str, tuple[float, float]]) -> None:
    colours, places = {"nf4": BLUE, "fp4": ORANGE, "int4": GREEN}, (-0.12, -0.24, -0.36)
    with picture(path, columns=2, size=(12, 4.8)) as (left, right):
        scaled = torch.cat([scale_blocks(weight.flatten(), BLOCK)[0].flatten() for weight in weights])
        left.hist(scaled.numpy(), bins=101, density=True, color=GREY, alpha=0.35)
        for row, (kind, colour) in enumerate(colours.items()):
            left.plot(LEVELS[kind](), [places[row]] * len(LEVELS[kind]()), "|", color=colour, markersize=13, mew=2)
        counts = [f"{kind.upper()} ({len(LEVELS[kind]().unique())})" for kind in colours]
        left.set_yticks([0, 0.5, 1, *places], ["0", "0.5", "1", *counts])
        left.set_title(text("Where the weights are, and where the levels", "權重在哪裡，位準就該在哪裡"))
        left.set_xlabel(text("weight / absmax of its block; (number of levels)", "權重 / 所屬區塊的 absmax；（位準個數）"))
        left.set_ylabel(text("density", "密度"))
        left.set_ylim(-0.46, None)
        largest = text("the largest\nof each block", "每個區塊中\n最大的權重")
        left.annotate(largest, (1, 0.25), (0.75, 0.6), ha="center", arrowprops={"arrowstyle": "->"})
        for row, (kind, colour) in enumerate(colours.items()):
            at = [group + 0.27 * (row - 1) for group in (0, 1)]
            bars = right.bar(at, [100 * value for value in errors[kind]], 0.25, color=colour, label=kind.upper())
            right.bar_label(bars, fmt="%.1f %%", padding=2)
        right.set_xticks([0, 1], [text("normal numbers", "常態分布亂數"), text("the embedded model", "內附的模型")])
        right.set_title(text("What quantization loses", "量化損失了多少"))
        right.set_ylabel(text("RMS error (% of the RMS weight)", "RMS 誤差（占權重 RMS 的 %）"))
        right.set_ylim(0, 1.2 * 100 * max(max(pair) for pair in errors.values()))
        right.grid(axis="x", visible=False)
        right.legend(ncols=3, loc="upper center")


def print_bits(weights: list[Tensor]) -> None:
    large = [torch.randn(2048, 2048)]
    kinds = (
        (text("absmax in fp32", "absmax 用 fp32"), "4 + 32/64", False),
        (text("double quantization", "雙重量化"), "4 + 8/64 + 32/(64 · 256)", True),
    )
    rows = [
        [name, formula, *(f"{bits_per_weight(stored, double):.4f}" for stored in (large, weights))]
        for name, formula, double in kinds
    ]
    header = ["NF4", text("formula", "公式"), "2048 x 2048", text("embedded model", "內附的模型")]
    print_table(text("Stored bits a weight", "每個權重儲存的位元數"), header, rows, words=2)
    saved = 100 * (1 - bits_per_weight(large, True) / bits_per_weight(large, False))
    print_text(
        text(
            f"Often quoted: double quantization saves 8 %. Measured: {saved:.1f} % of a packed weight. The 8-bit levels are a "
            "table of bitsandbytes' own, where summaries often say FP8.",
            f"常見的說法：雙重量化省下 8%。實測：壓縮後的權重再小 {saved:.1f}%。常有人說那 8 個位元是 FP8，"
            "其實是 bitsandbytes 自己的一張位準表。",
        )
    )


def print_errors(errors: dict[str, tuple[float, float]]) -> None:
    rows, over = [], {}
    for kind, pair in errors.items():
        over[kind] = [value / best for value, best in zip(pair, errors["nf4"], strict=True)]
        rows.append([kind.upper(), *(percent(100 * value, 2) for value in pair), *(f"{ratio:.2f}" for ratio in over[kind])])
    header = text(
        "|normal numbers|embedded model|times NF4, normal|times NF4, model",
        "|常態分布亂數|內附的模型|亂數：NF4 的倍數|模型：NF4 的倍數",
    )
    title = text("RMS error over RMS weight, blocks of 64", "RMS 誤差 / 權重 RMS，每 64 個一個區塊")
    print_table(title, header.split("|"), rows)
    fp4, int4 = over["fp4"][1], over["int4"][1]
    print_text(
        text(
            f"Often quoted: NF4 is 1.8 times as precise as FP4, or as evenly spaced INT4. Measured on these weights: FP4's error "
            f"is {fp4:.2f} times NF4's, INT4's {int4:.2f} times; squared, {fp4**2:.2f} and {int4**2:.2f} times. So 1.8 is near "
            "the truth for the squared error of FP4 alone. FP4 spends one of its 16 codes on a second zero, INT4 leaves out -8.",
            f"常見的說法：NF4 的精確度是 FP4（或等距的 INT4）的 1.8 倍。在這些權重上實測：FP4 的誤差是 NF4 的 {fp4:.2f} 倍，"
            f"INT4 是 {int4:.2f} 倍；平方之後是 {fp4**2:.2f} 倍與 {int4**2:.2f} 倍。所以 1.8 倍只適用於 FP4 的平方誤差。"
            "4 個位元有 16 個位準，FP4 把其中一個用在第二個零，INT4 則捨棄 -8。",
        )
    )


def print_damage(model: nn.Module) -> None:
    blocks, rows, divergence = load_blocks(256)[:EVALUATED], [], []
    before = log_probabilities(model, blocks)
    for kind, double_quant in (("nf4", False), ("nf4", True), ("fp4", False), ("int4", False)):
        name = kind.upper() + text(", double quantization", "，雙重量化") * double_quant
        progress(text(f"predicting with weights in {name}", f"權重存成 {name}，再做預測"))
        both = measure_damage(model, before, kind, double_quant, blocks)
        rows.append([name, *(f"{b.mean():.4f} ± {standard_error(b):.4f}" for b in both)])
        divergence.append(both[1])
    header = [
        text("projections in", "投影層用"),
        text("change of the loss", "損失的變化"),
        text("divergence from fp32", "與 fp32 的散度"),
    ]
    title = text(
        f"Predictions on {len(blocks)} blocks of 256 tokens, nats a token ± standard error",
        f"對 {len(blocks)} 個區塊（各 256 個 token）的預測，nats / token ± 標準誤",
    )
    print_table(title, header, rows)
    nf4, double, fp4, int4 = divergence
    fp4_times, int4_times, change = (ratio_of_means(other, nf4) for other in (fp4, int4, double))
    more, error = 100 * (change[0] - 1), 100 * change[1]
    noise = text(", within noise", "，在誤差範圍內") * (abs(more) < 2 * error)
    print_text(
        text(
            f"On so few tokens the loss may fall by chance. The divergence says how far the predictions moved, for better or "
            f"worse: FP4's is {fp4_times[0]:.2f} ± {fp4_times[1]:.2f} times NF4's, INT4's {int4_times[0]:.2f} ± "
            f"{int4_times[1]:.2f} times; double quantization changes it by {more:+.1f} ± {error:.1f} %{noise}.",
            f"只看這麼少的 token，損失可能碰巧變小。散度則說明預測移動了多少，不論變好或變壞：FP4 是 NF4 的 "
            f"{fp4_times[0]:.2f} ± {fp4_times[1]:.2f} 倍，INT4 是 {int4_times[0]:.2f} ± {int4_times[1]:.2f} 倍；"
            f"雙重量化讓它改變 {more:+.1f} ± {error:.1f}%{noise}。",
        )
    )


def standard_error(values: Tensor) -> float:
    return values.std().item() / math.sqrt(len(values))


def ratio_of_means(values: Tensor, others: Tensor) -> tuple[float, float]:
    """Return mean(values) / mean(others) of the same blocks, and its standard error (of the residuals: the delta method)."""
    ratio = (values.mean() / others.mean()).item()
    return ratio, standard_error(values - ratio * others) / others.mean().item()


def main(argv: list[str] | None = None) -> None:
    arguments = begin(create_parser(__doc__, "quantization"), argv)
    torch.manual_seed(0)
    model, normal = load_model(), [torch.randn(1024, 1024)]
    weights = [weight.detach() for weight in projection_weights(model)]
    progress(text("packing weights in 4 bits", "把權重壓成 4 個位元"))
    print_bits(weights)
    progress(text("measuring the errors of NF4, FP4 and INT4", "測量 NF4、FP4、INT4 的誤差"))
    errors = {kind: (relative_error(normal, kind), relative_error(weights, kind)) for kind in LEVELS}
    print_errors(errors)
    print_damage(model)
    draw(arguments.output_dir / "quantization.png", weights, errors)
    finish(arguments)


if __name__ == "__main__":
    cli.run(main)
