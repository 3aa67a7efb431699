"""Cost and use of a LoRA rank: parameters, time, the error of a low-rank copy of a full update, the loss after training.

    python -m finetuning_lessons.rank_study

The matrix of rank r that is closest to a full update ΔW keeps its r largest singular values (Eckart and Young, 1936). Its error,
sqrt(Σ σᵢ² beyond r / Σ σᵢ²), is the least that LoRA can reach at rank r: 0 % is an exact copy. The lesson copies the updates that
full fine-tuning makes to the embedded model's projections, and random matrices of the same shapes, which have no structure.

Then it trains the embedded model on the same tokens, at several ranks, on several sets of projections, with 4-bit and 16-bit
bases. A seed decides the order of the text and where A starts; what the lesson states is the mean of the stored seeds. All
ranks have alpha = 2 rank and one learning rate; the lesson variants.py varies both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finetuning_lessons.layers import ALL_SEVEN, ATTENTION, LoRALayer, count_parameters
from finetuning_lessons.lesson import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    TINY_MODEL,
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
from finetuning_lessons.low_rank import best_errors, fitted_error, pooled_errors
from finetuning_lessons.seeds import Measured, Results, Spread, add_flag, measure_seeds, print_place, time_in_turns
from finetuning_lessons.short_run import Text, load_split, use_one_thread
from finetuning_lessons.words import percent, text
from qlora_kit import cli

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TRAINED_RANKS = (4, 8, 16, 32, 64)
WIDTH = 768  # size of the layer that is timed
STEPS = 10  # of 4 x 128 tokens
LEARNING_RATE, FULL_LEARNING_RATE = 2e-3, 5e-4  # the best of 1, 2 and 5 times a power of ten
TIMED = 20  # forward passes per rank

# What is measured. Errors are those of copies of a matrix, relative to it.
LOSS, TIME = "held-out loss, nats a token", "forward pass of 128 tokens, ms"
RANDOM, REAL, ONE, FITTED = (
    "least error, random numbers", "least error, all updates", "least error, one update", "error of trained A and B, one update",
)  # fmt: skip
BASE, FULL = "base model", "full fine-tuning"


def fine_tune_fully(split: Text, steps: int) -> tuple[list[Tensor], float]:
    """Train every weight of the embedded model; return the update of each projection, (out, in), and the held-out loss."""
    before, model = load_model(), load_model()
    train(model, split.train, steps, FULL_LEARNING_RATE)
    after = dict(model.named_parameters())
    names = [name for name in after if name.removesuffix(".weight").endswith(ALL_SEVEN)]
    start = dict(before.named_parameters())
    return [(after[name] - start[name]).detach() for name in names], held_out_loss(model, split.held_out)


@torch.no_grad()
def forward_times(rounds: int) -> dict[str, float]:
    """Return the median milliseconds of a forward pass of 128 tokens through WIDTH x WIDTH at each rank; "0" is without LoRA."""
    layers: dict[int, Any] = {rank: LoRALayer(WIDTH, WIDTH, rank, alpha=2.0 * rank) for rank in RANKS}
    layers[0] = layers[1].linear
    x = torch.randn(1, 128, WIDTH)
    return time_in_turns({str(rank): partial(layer, x) for rank, layer in layers.items()}, rounds)


def copy_errors(updates: list[Tensor]) -> Measured:
    """Return for each of RANKS the least error of copies, and that of A and B trained to copy the first layer's q."""
    random = [torch.randn_like(update) for update in updates]
    errors = {RANDOM: pooled_errors(random, RANKS), REAL: pooled_errors(updates, RANKS), ONE: best_errors(updates[0], RANKS)}
    errors[FITTED] = [fitted_error(updates[0], rank) for rank in RANKS]
    return {name: dict(zip(map(str, RANKS), values, strict=True)) for name, values in errors.items()}


@dataclass(frozen=True)
class Run:
    """One training run of the study; its name in both languages."""

    name: str
    chinese: str
    rank: int = 16
    targets: tuple[str, ...] = ALL_SEVEN
    base: str = "16-bit"  # or nf4, fp4

    def label(self) -> str:
        return text(self.name, self.chinese)


RUNS = (
    *(Run(f"rank {rank}", f"rank {rank}", rank) for rank in TRAINED_RANKS),
    Run("q and v only", "只有 q 和 v", targets=("q_proj", "v_proj")),
    Run("attention only", "只有注意力", targets=ATTENTION),
    Run("attention, rank 42", "注意力，rank 42", rank=42, targets=ATTENTION),  # as many parameters as all seven at rank 16
    Run("NF4 base", "NF4 基礎模型", base="nf4"),
    Run("FP4 base", "FP4 基礎模型", base="fp4"),
)


def load_base(kind: str) -> Any:
    """Load the embedded model with its 16-bit weights, or packed to 4 bits; products are in fp32 either way."""
    if kind == "16-bit":
        return load_model()
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL, quantization_config=packing, dtype=torch.float32)


def adapt(run: Run, seed: int) -> Any:
    """Return the base model with LoRA of a run."""
    base = load_base(run.base)
    torch.manual_seed(seed)  # decides where A starts
    config = LoraConfig(r=run.rank, lora_alpha=2 * run.rank, target_modules=list(run.targets), task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def train_run(run: Run, split: Text, steps: int, seed: int) -> float:
    """Return the held-out loss after training."""
    model = adapt(run, seed)
    train(model, split.train, steps, LEARNING_RATE)
    return held_out_loss(model, split.held_out)


def measure(seed: int, steps: int) -> Measured:
    """Measure everything for one seed."""
    torch.manual_seed(seed)
    progress(text("timing a layer", "測量一層的時間"))
    times, split = forward_times(TIMED), load_split(seed)
    progress(text("training: full fine-tuning", "訓練：全參數微調"))
    updates, full_loss = fine_tune_fully(split, steps)
    losses = {BASE: held_out_loss(load_model(), split.held_out), FULL: full_loss}
    progress(text("copying its updates at low rank", "用低秩矩陣複製它的更新"))
    errors = copy_errors(updates)
    for run in RUNS:
        progress(text(f"training: {run.name}", f"訓練：{run.chinese}"))
        losses[run.name] = train_run(run, split, steps, seed)
    return {LOSS: losses, TIME: times} | errors


def print_costs(one: Measured, results: Results) -> None:
    rows = []
    for rank in RANKS:
        parameters = 2 * WIDTH * rank  # A (rank, in) and B (out, rank)
        errors = [f"{100 * one[name][str(rank)]:.1f} %" for name in (RANDOM, REAL, ONE, FITTED)]
        share = f"{100 * parameters / WIDTH**2:.2f} %"
        rows.append([str(rank), f"{parameters:,}", share, f"{one[TIME][str(rank)]:.2f}", *errors])
    title = text(
        f"A layer of {WIDTH} x {WIDTH}; errors of copies of the embedded model's updates",
        f"{WIDTH} x {WIDTH} 的一層；複製內建模型更新量的誤差",
    )
    header = ["rank", text("parameters", "參數量"), text("share", "比例"), text("forward ms", "前向 ms")]
    header += [text("random", "亂數"), text("all updates", "全部更新"), text("one update", "單一更新")]
    print_table(title, [*header, text("trained copy", "訓練出的複本")], rows, words=0)
    print_copies(results)
    print_times(results)


def print_copies(results: Results) -> None:
    def kept(name: str) -> Spread:
        return results.spread(lambda one: 100 * (1 - one[name]["16"] ** 2))

    def apart(one: Measured) -> float:
        return 100 * max(one[FITTED][rank] - one[ONE][rank] for rank in one[ONE])

    most = max(results.spread(apart).values)
    print_text(
        text(
            f"Rank 16 can keep {kept(REAL):.1f} % of the squares of the real updates, and {kept(RANDOM):.1f} % of random ones: "
            "what training adds is nearer to low rank, which is what LoRA bets on. Training A and B ends within "
            f"{most:.1f} points of the least. Those matrices have at most 192 singular values, so that a copy of rank 256 is "
            f"exact. Above rank {WIDTH // 2}, A and B of a layer of {WIDTH} x {WIDTH} have more parameters than W.",
            f"rank 16 能保留真實更新量平方和的 {kept(REAL):.1f}%，亂數則只有 {kept(RANDOM):.1f}%：訓練帶來的更新比較接近低秩，"
            f"這正是 LoRA 的假設。直接訓練 A 和 B，和理論最小誤差相差不到 {most:.1f} 個百分點。這些矩陣最多只有 192 個奇異值，"
            f"所以 rank 256 可以完全複製。超過 rank {WIDTH // 2} 之後，{WIDTH} x {WIDTH} 這一層的 A 和 B 會比 W 還大。",
        )
    )


def print_times(results: Results) -> None:
    def extra(rank: str, unit: str) -> str:
        return results.spread(lambda one: 100 * (one[TIME][rank] / one[TIME]["0"] - 1)).compared(".0f", unit)

    without, low, high = (results.median_range(TIME, rank, 2) for rank in ("0", "8", "256"))
    print_text(
        text(
            f"Median (range) of {results.title()}: without LoRA the layer takes {without} ms, at rank 8 {low}, at rank 256 "
            f"{high}. Beside W, rank 8 takes {extra('8', ' %')} longer and rank 256 {extra('256', ' %')}. Merged, every rank "
            "takes what the layer takes without.",
            f"{results.title()}的中位數（與範圍）：沒有 LoRA 時這一層要 {without} ms，rank 8 要 {low}，rank 256 要 {high}。"
            f"不合併時，rank 8 多花 {extra('8', '%')}，rank 256 多花 {extra('256', '%')}。"
            "合併之後，任何 rank 的時間都和沒有 LoRA 一樣。",
        )
    )


def count_trained(run: Run, model: torch.nn.Module) -> int:
    """Return the number of parameters of A (rank, in) and B (out, rank) of a run's projections."""
    layers = [layer for name, layer in model.named_modules() if name.endswith(run.targets)]
    return run.rank * sum(layer.in_features + layer.out_features for layer in layers)  # type: ignore[operator,misc]


def print_losses(one: Measured, results: Results, steps: int) -> None:
    model = load_model()
    total, rows = count_parameters(model)[1], []
    for run in RUNS:
        trainable = count_trained(run, model)
        share = f"{100 * trainable / total:.1f} %"
        rows.append([run.label(), f"{trainable:,}", share, f"{one[LOSS][run.name]:.3f}", f"{results.of(LOSS, run.name):.3f}"])
    rows.append([text(FULL, "全參數微調"), f"{total:,}", "100.0 %", f"{one[LOSS][FULL]:.3f}", f"{results.of(LOSS, FULL):.3f}"])
    base = one[LOSS][BASE]
    title = text(
        f"Held-out loss after {steps} steps of 4 x 128 tokens; base model {base:.3f}",
        f"{steps} 步（每步 4 x 128 個 token）後的驗證損失；基礎模型 {base:.3f}",
    )
    header = [text("run", "實驗"), text("trained", "訓練參數"), text("share", "比例"), text("this run", "這一次")]
    print_table(title, [*header, results.title()], rows)


def gain_of(name: str) -> Callable[[Measured], float]:
    """Return the function that computes how far a run of one seed gets below the base model's loss."""
    return lambda one: one[LOSS][BASE] - one[LOSS][name]


def share_of(name: str, whole: str) -> Callable[[Measured], float]:
    """Return the function that computes a run's gain in percent of another's."""
    return lambda one: 100 * gain_of(name)(one) / gain_of(whole)(one)


def print_findings(results: Results) -> None:
    full, sixteen = (results.spread(gain_of(name)) for name in (FULL, "rank 16"))
    most = f"rank {TRAINED_RANKS[-1]}"
    shares = {rank: results.spread(share_of(f"rank {rank}", most)) for rank in TRAINED_RANKS[:-1]}
    order = results.order(LOSS, {f"rank {rank}": str(rank) for rank in TRAINED_RANKS})
    print_text(
        text(
            f"Full fine-tuning takes {full:.3f} off the loss, rank 16 {sixteen:.3f}. Of what {most} takes off, the ranks take "
            f"{', '.join(f'{rank}: {share:.0f} %' for rank, share in shares.items())}. Ranks of 8 to 32 are often said to be "
            f"enough. From the lowest loss: {order}.",
            f"全參數微調讓損失降低 {full:.3f}，rank 16 降低 {sixteen:.3f}。各 rank 的降幅占 {most} 的比例："
            f"{'、'.join(f'{rank}：{share:.0f}%' for rank, share in shares.items())}。常聽說 rank 8 到 32 就夠。"
            f"損失由低到高：{order}。",
        )
    )
    print_targets(results)
    nf4, fp4 = (results.gap(LOSS, name, "rank 16").compared("+.3f", " nats") for name in ("NF4 base", "FP4 base"))
    print_text(
        text(
            f"An NF4 base instead of 16-bit weights changes the final loss by {nf4} a token, an FP4 base by {fp4}.",
            f"把 16-bit 的基礎模型換成 NF4，每個 token 的損失最後改變 {nf4}；換成 FP4 則改變 {fp4}。",
        )
    )


def print_targets(results: Results) -> None:
    def further(name: str, unit: str) -> str:
        return results.spread(lambda one: share_of("rank 16", name)(one) - 100).compared("+.0f", unit)

    one, fair = "attention only", "attention, rank 42"
    two = results.spread(share_of("q and v only", "rank 16"))
    print_text(
        text(
            "With the MLP's projections, the loss falls further than with attention alone: "
            f"{further(one, ' %')} at rank 16, {further(fair, ' %')} at the same number of parameters; 10 to 20 % are often "
            f"quoted. q and v alone reach {two:.0f} % of what all seven do.",
            f"加上 MLP 的投影層，損失的降幅比只用注意力：同樣 rank 16 時 {further(one, '%')}，同樣參數量時 {further(fair, '%')}；"
            f"常見的說法是多 10% 到 20%。只用 q 和 v，可達七個投影層全用的 {two:.0f}%。",
        )
    )


def draw_parameters(axes: Any) -> None:
    """Draw what LoRA trains of a layer at each rank, beside the layer itself."""
    places = range(len(RANKS))
    axes.bar(places, [2 * WIDTH * rank for rank in RANKS], color=BLUE, label=text("A and B, trained", "A 和 B（訓練）"))
    axes.axhline(WIDTH**2, color=ORANGE, linestyle="--", label=text("W, frozen", "W（凍結）"))
    for place, rank in zip(places, RANKS, strict=True):
        share = 200 * rank / WIDTH
        axes.annotate(
            percent(share, 1 if share < 10 else 0),
            (place, 2 * WIDTH * rank),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.set_yscale("log")
    axes.set_xticks(places, [str(rank) for rank in RANKS])
    axes.set_ylim(1e3, 3e6)
    axes.set(title=text(f"Parameters of a layer of {WIDTH} x {WIDTH}", f"{WIDTH} x {WIDTH} 一層的參數量"), xlabel="rank")
    axes.set_ylabel(text("parameters (logarithmic)", "參數量（對數刻度）"))
    axes.legend(loc="upper left")


def draw_copies(axes: Any, results: Results) -> None:
    curves = {
        RANDOM: (text("random numbers, no structure", "亂數，沒有結構"), GREY, "--"),
        REAL: (text("all real updates", "全部真實更新"), BLUE, "-"),
        ONE: (text("one real update", "單一真實更新"), GREEN, "-"),
        FITTED: (text("that update, A and B trained", "同一更新，訓練 A 和 B"), ORANGE, "none"),
    }
    for name, (label, colour, line) in curves.items():
        spreads = [results.of(name, str(rank)) for rank in RANKS]
        means, errors = [100 * spread.mean for spread in spreads], [100 * spread.error for spread in spreads]
        marker = "s" if line == "none" else "o"
        axes.errorbar(RANKS, means, yerr=errors, fmt=marker, linestyle=line, color=colour, capsize=3, markersize=5, label=label)
    title = text("Least error of a copy of a full update", "複製完整更新量的最小誤差")
    axes.set(title=title, xlabel="rank", ylabel=text("relative error (%)", "相對誤差（%）"), ylim=(-3, 105))
    axes.legend(loc="lower left", fontsize=9)


def draw_ranks(axes: Any, one: Measured, results: Results) -> None:
    spreads = [results.of(LOSS, f"rank {rank}") for rank in TRAINED_RANKS]
    means, errors = [spread.mean for spread in spreads], [spread.error for spread in spreads]
    axes.errorbar(TRAINED_RANKS, means, yerr=errors, fmt="o-", color=BLUE, capsize=4, label=results.label())
    mine = [one[LOSS][f"rank {rank}"] for rank in TRAINED_RANKS]
    axes.plot(TRAINED_RANKS, mine, "x", color=ORANGE, markersize=8, label=text("this run", "這一次"))
    full = results.of(LOSS, FULL)
    axes.axhline(full.mean, color=GREY, linestyle="--", label=text("full fine-tuning", "全參數微調"))
    title = text("Loss after the same tokens", "訓練同樣 token 後的損失")
    axes.set(title=title, xlabel="rank", ylabel=text("held-out loss (nats a token)", "驗證損失（nats / token）"))
    axes.legend(fontsize=9)


def draw_variants(axes: Any, one: Measured, results: Results) -> None:
    runs = [run for run in RUNS if run.name == "rank 16" or not run.name.startswith("rank")]
    labels = [text("all seven, 16-bit", "七層全用，16-bit") if run.name == "rank 16" else run.label() for run in runs]
    gains: list[Spread] = [results.spread(gain_of(run.name)) for run in runs]
    axes.barh(labels, [gain.mean for gain in gains], xerr=[gain.error for gain in gains], color=BLUE, capsize=4)
    axes.plot([gain_of(run.name)(one) for run in runs], labels, "x", color=ORANGE, markersize=8)
    for place, gain in enumerate(gains):
        axes.text(0.02 * gains[0].mean, place, f"{gain:.3f}", va="center", color="white")
    axes.invert_yaxis()
    axes.grid(visible=False)
    title = text("What is trained, and on which base (rank 16)", "訓練哪些層、用哪種基礎模型（rank 16）")
    axes.set(title=title, xlabel=text("reduction in held-out loss (nats a token)", "驗證損失的降幅（nats / token）"))


def draw(path: Path, one: Measured, results: Results) -> None:
    with picture(path, columns=2, rows=2, size=(12, 9)) as ((parameters, copied), (ranked, variants)):
        draw_parameters(parameters)
        draw_copies(copied, results)
        draw_ranks(ranked, one, results)
        draw_variants(variants, one, results)
        for axes, ticks in ((copied, RANKS), (ranked, TRAINED_RANKS)):
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, ticks)


def main(argv: list[str] | None = None) -> None:
    parser = create_parser(__doc__, "rank_study")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="optimizer steps of each run (%(default)s)")
    add_flag(parser)
    arguments = begin(parser, argv)
    use_one_thread()
    one, results = measure_seeds(arguments, lambda seed: measure(seed, arguments.steps), {"steps": arguments.steps})
    print_costs(one, results)
    print_losses(one, results, arguments.steps)
    print_findings(results)
    print_place(one, results, LOSS)
    draw(arguments.output_dir / "rank_study.png", one, results)
    finish(arguments)


if __name__ == "__main__":
    cli.run(main)
