"""Variants of LoRA beside its learning rate: rsLoRA, DoRA and PiSSA at several rates, and how alpha should follow the rank.

    python -m finetuning_lessons.variants

    LoRA      W + alpha/rank · B A (arXiv 2106.09685)
    rsLoRA    W + alpha/√rank · B A, so that a higher rank does not learn more slowly (arXiv 2312.03732)
    DoRA      the same update for the directions of W's columns, and a trained length for each (arXiv 2402.09353)
    PiSSA     A and B start as W's largest singular vectors, and what is left of W is frozen (arXiv 2404.02948)

All are peft's, on all seven projections of the embedded model and on the same tokens. A model this small, trained for seconds,
ranks no variants for larger ones. The lesson leaves out LoRA+, which gives B a higher rate than A.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from finetuning_lessons.layers import ALL_SEVEN
from finetuning_lessons.lesson import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
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
from finetuning_lessons.seeds import Measured, Results, Spread, add_flag, measure_seeds, print_place
from finetuning_lessons.short_run import use_one_thread
from finetuning_lessons.words import text
from qlora_kit import cli

STEPS = 10  # of 4 x 64 tokens
HELD_OUT = 32  # blocks of 64 tokens
RANK, ALPHA = 16, 32
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},  # at the same alpha its update has 4 times the scale
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
}
# What multiplies B A at each rank; at rank 16 all three are 2.
RULES: dict[str, Callable[[int], float]] = {
    "alpha fixed": lambda rank: ALPHA / rank,
    "rsLoRA": lambda rank: 8 / rank**0.5,
    "alpha = 2 rank": lambda rank: 2.0,
}
RULE_RANKS, RULE_RATE = (4, 16, 64), 2e-3
LOSS, RULE_LOSS = "held-out loss by variant and rate, nats a token", "held-out loss by rule and rank, nats a token"
BASE = "base model"


def train_variant(
    split: tuple[torch.Tensor, torch.Tensor], seed: int, steps: int, rate: float, rank: int, **options: Any
) -> float:
    """Return the held-out loss of LoRA with peft's options after training."""
    torch.manual_seed(seed)  # decides where A starts
    settings: dict[str, Any] = {"r": rank, "lora_alpha": ALPHA, "target_modules": list(ALL_SEVEN)} | options
    model = get_peft_model(load_model(), LoraConfig(task_type="CAUSAL_LM", **settings))
    train(model, split[0], steps, rate)
    return held_out_loss(model, split[1])


def measure(seed: int, steps: int) -> Measured:
    """Train every variant at every rate, and LoRA at every rank by every rule; the seed decides the order of the text and A."""
    blocks = load_blocks(64)
    blocks, held_out = blocks[:-HELD_OUT], blocks[-HELD_OUT:]
    split = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))], held_out
    losses = {BASE: held_out_loss(load_model(), held_out)}
    for name, options in VARIANTS.items():
        progress(text(f"training {name} at {len(RATES)} learning rates", f"以 {len(RATES)} 種學習率訓練 {name}"))
        for rate in RATES:
            losses[f"{name}, {rate:g}"] = train_variant(split, seed, steps, rate, RANK, **options)
    by_rule = {}
    for name, scale in RULES.items():
        progress(text(f"training ranks {RULE_RANKS}: {name}", f"訓練 rank {RULE_RANKS}：{name}"))
        for rank in RULE_RANKS:
            same = rank == RANK  # then it is LoRA as above
            by_rule[f"{name}, {rank}"] = (
                losses[f"LoRA, {RULE_RATE:g}"]
                if same
                else train_variant(split, seed, steps, RULE_RATE, rank, lora_alpha=scale(rank) * rank)
            )
    return {LOSS: losses, RULE_LOSS: by_rule}


def best_rate(results: Results, variant: str) -> float:
    """Return the rate with the lowest mean loss."""
    return min(RATES, key=lambda rate: results.of(LOSS, f"{variant}, {rate:g}").mean)


def print_variants(results: Results, base: float, steps: int) -> None:
    rows = []
    for name in VARIANTS:
        rows.append([name, *(f"{results.of(LOSS, f'{name}, {rate:g}'):.3f}" for rate in RATES)])
    title = text(
        f"Held-out loss after {steps} steps, by learning rate; {results.title()}; base model {base:.3f}",
        f"{steps} 步後的驗證損失，依學習率；{results.title()}；基礎模型 {base:.3f}",
    )
    print_table(title, [f"rank {RANK}", *(f"{rate:g}" for rate in RATES)], rows)
    best = {name: f"{name}, {best_rate(results, name):g}" for name in VARIANTS}
    rates = ", ".join(f"{name} {best_rate(results, name):g}" for name in VARIANTS)
    ends = sorted((results.of(LOSS, item).mean, item) for item in best.values())
    between = results.gap(LOSS, ends[-1][1], ends[0][1])
    plain = sorted((results.of(LOSS, f"LoRA, {rate:g}").mean, f"LoRA, {rate:g}") for rate in RATES)
    within = results.gap(LOSS, plain[-1][1], plain[0][1])
    order = results.order(LOSS, {item: name for name, item in best.items()})
    more = within.mean > between.mean
    print_text(
        text(
            f"From the worst of these rates to the best, plain LoRA gains {within.compared('.3f', ' nats')}. Between the worst "
            f"and the best variant, each at its own best rate, lie {between.compared('.3f', ' nats')}. Best rates: {rates}. "
            f"From the lowest loss at these: {order}."
            + (" Who compares variants at one rate compares mostly the rate: tune it first." if more else ""),
            f"單是 LoRA，從最差的學習率換到最好的，損失就少 {within.compared('.3f', ' nats')}。各變體都用自己最好的學習率時，"
            f"最差與最好的變體相差 {between.compared('.3f', ' nats')}。各自最好的學習率：{rates.replace(', ', '、')}。"
            f"這時損失由低到高：{order}。" + ("只用一種學習率來比較，比到的多半是學習率：先調它。" if more else ""),
        )
    )


def print_rules(results: Results) -> None:
    low, high = RULE_RANKS[0], RULE_RANKS[-1]
    rows = []
    for name, scale in RULES.items():
        scales = " / ".join(f"{scale(rank):g}" for rank in RULE_RANKS)
        rows.append([name, scales, *(f"{results.of(RULE_LOSS, f'{name}, {rank}'):.3f}" for rank in RULE_RANKS)])
    title = text(
        f"Held-out loss by rank at learning rate {RULE_RATE:g}, for three rules of scaling B A",
        f"三種縮放 B A 的規則，各 rank 的驗證損失（學習率 {RULE_RATE:g}）",
    )
    header = [text("rule", "規則"), text("scales", "縮放"), *(f"rank {rank}" for rank in RULE_RANKS)]
    print_table(title, header, rows, words=2)
    fixed, root, double = (results.gap(RULE_LOSS, f"{name}, {low}", f"{name}, {high}").compared(".3f", " nats") for name in RULES)
    print_text(
        text(
            f"From rank {low} to rank {high} the loss falls by {fixed} with alpha fixed at {ALPHA}, by {root} with rsLoRA's "
            f"alpha/√rank, and by {double} with alpha = 2 rank. A fixed alpha makes the update of a low rank large and that of a "
            "high rank small: ranks are then compared at different learning rates in effect.",
            f"rank 從 {low} 增加到 {high}，alpha 固定為 {ALPHA} 時損失下降 {fixed}，用 rsLoRA 的 alpha/√rank 時下降 {root}，"
            f"alpha = 2 rank 時下降 {double}。固定 alpha 會放大低 rank 的更新、縮小高 rank 的更新："
            "等於用不同的學習率在比較 rank。",
        )
    )


def draw_rates(axes: Any, one: Measured, results: Results) -> None:
    top = one[LOSS][BASE] + 0.8  # what ends above it has diverged
    for (name, colour), marker in zip(zip(VARIANTS, (BLUE, ORANGE, GREEN, PURPLE), strict=True), "osD^", strict=True):
        spreads: list[Spread] = [results.of(LOSS, f"{name}, {rate:g}") for rate in RATES]
        means, errors = [spread.mean for spread in spreads], [spread.error for spread in spreads]
        axes.errorbar(RATES, means, yerr=errors, fmt=f"{marker}-", color=colour, capsize=4, label=name)
        axes.plot(RATES, [one[LOSS][f"{name}, {rate:g}"] for rate in RATES], "x", color=colour, markersize=8)
        for rate, mean in zip(RATES, means, strict=True):
            if mean > top:
                axes.annotate(
                    f"{name}: {mean:.1f} ↑",
                    (rate, top),
                    (-4, -12 - 13 * list(VARIANTS).index(name)),
                    ha="right",
                    color=colour,
                    textcoords="offset points",
                )
    axes.set_ylim(top=top)
    axes.plot([], [], "x", color=GREY, label=text("this run", "這一次"))
    axes.axhline(one[LOSS][BASE], color=GREY, linestyle="--", label=text("base model", "基礎模型"))
    axes.set_xscale("log")
    axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    axes.minorticks_off()
    axes.set_title(text(f"Variants and their learning rate (rank {RANK})", f"各種變體與學習率（rank {RANK}）"))
    axes.set_xlabel(text("learning rate (logarithmic)", "學習率（對數刻度）"))
    axes.set_ylabel(text("held-out loss (nats a token)", "驗證損失（nats / token）"))
    axes.legend(fontsize=9, ncols=2, loc="upper left")


def draw_rules(axes: Any, one: Measured, results: Results) -> None:
    names = {
        "alpha fixed": text(f"alpha/rank, alpha = {ALPHA}", f"alpha/rank，alpha = {ALPHA}"),
        "rsLoRA": text("rsLoRA: 8/√rank", "rsLoRA：8/√rank"),
        "alpha = 2 rank": text("always 2 (alpha = 2 rank)", "永遠是 2（alpha = 2 rank）"),
    }
    for (name, colour), marker in zip(zip(RULES, (ORANGE, BLUE, GREEN), strict=True), "so^", strict=True):
        spreads = [results.of(RULE_LOSS, f"{name}, {rank}") for rank in RULE_RANKS]
        means, errors = [spread.mean for spread in spreads], [spread.error for spread in spreads]
        axes.errorbar(RULE_RANKS, means, yerr=errors, fmt=f"{marker}-", color=colour, capsize=4, label=names[name])
        mine = [one[RULE_LOSS][f"{name}, {rank}"] for rank in RULE_RANKS]
        axes.plot(RULE_RANKS, mine, "x", color=colour, markersize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(RULE_RANKS, RULE_RANKS)
    axes.set_title(text("What multiplies B A (mean ± standard error)", "B A 乘上多少（平均 ± 標準誤）"))
    axes.set_xlabel("rank")
    axes.set_ylabel(text("held-out loss (nats a token)", "驗證損失（nats / token）"))
    axes.legend(fontsize=9)


def main(argv: list[str] | None = None) -> None:
    parser = create_parser(__doc__, "variants")
    add_flag(parser)
    arguments = begin(parser, argv)
    use_one_thread()
    one, results = measure_seeds(arguments, lambda seed: measure(seed, STEPS), {"steps": STEPS})
    print_variants(results, one[LOSS][BASE], STEPS)
    print_rules(results)
    print_place(one, results, LOSS)
    with picture(arguments.output_dir / "variants.png", columns=2, size=(12, 4.8)) as (left, right):
        draw_rates(left, one, results)
        draw_rules(right, one, results)
    finish(arguments)


if __name__ == "__main__":
    cli.run(main)
