"""Draw rules of thumb: parameters of LoRA by rank, and memory of full fine-tuning, LoRA and QLoRA by model size, beside cards.

    from finetuning_lessons.course import visualize_memory_requirements

The rules count bytes a parameter and leave out activations, LoRA's own parameters and the CUDA context. memory.py has the whole
account, and measured runs beside it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt

from finetuning_lessons.lesson import BLUE, GREEN, GREY, ORANGE, RED, drawing, print_text
from finetuning_lessons.memory import fits_on_card
from finetuning_lessons.words import PARAMETERS, percent, text
from qlora_kit.config import GIB
from qlora_kit.planning.cards import CARDS

GB = 1e9  # bytes; a billion parameters of one byte
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
USUAL_RANKS = (8, 16, 32)


def visualize_lora_efficiency() -> None:
    """Draw the parameters that LoRA trains on a layer of 4,096 x 4,096, by rank; print those of the usual ranks."""
    hidden_size = 4096
    original = hidden_size**2
    trained = [2 * hidden_size * rank for rank in RANKS]
    shares = [100 * number / original for number in trained]
    names = [str(rank) for rank in RANKS]
    with drawing():
        _, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
        left.axhline(original, color=GREY, linestyle="--", label=text("the layer itself, frozen", "原本的層，凍結"))
        left.bar(names, trained, color=BLUE, label=text("LoRA, trained", "LoRA，可訓練"))
        left.set(title=text(*PARAMETERS), xlabel="rank", ylabel=text(*PARAMETERS), yscale="log")
        left.legend()
        bars = right.bar(names, shares, color=ORANGE)
        shown = [percent(share, 2) if rank in USUAL_RANKS else "" for rank, share in zip(RANKS, shares, strict=True)]
        right.bar_label(bars, labels=shown)
        right.set(title=text("Share of the layer", "占原本層的比例"), xlabel="rank", ylabel="%")
        plt.show()
    for rank in USUAL_RANKS:
        share = 200 * rank / hidden_size
        print(text(f"rank {rank}: {share:.3f} % of the layer's parameters", f"rank {rank}：占這一層參數量的 {share:.3f}%"))


def visualize_memory_requirements() -> None:
    """Draw what full fine-tuning needs: 16-bit weights and gradients, and Adam's two fp32 moments."""
    parts = {
        ("weights, 2 bytes", "權重，2 bytes"): 2.0,
        ("gradients, 2 bytes", "梯度，2 bytes"): 2.0,
        ("Adam's moments, 8 bytes", "Adam 的動差，8 bytes"): 8.0,
    }
    sizes = (1, 3, 7, 13, 70)
    cards = {name: name for name in ("RTX 4090", "A100 40GB", "A100 80GB")}
    title = ("Full fine-tuning in 16 bits, without activations", "16-bit 全參數微調，不含激活值")
    with _memory_chart(title, sizes, parts, cards) as axes:
        for position, billions in enumerate(sizes):
            total = sum(parts.values()) * billions
            label = text(f"{total:g} GB in all", f"合計 {total:g} GB")
            axes.annotate(label, (position, 8 * billions), (position, 9.5 * billions), ha="center")


def visualize_qlora_memory() -> None:
    """Draw full fine-tuning, LoRA and QLoRA by model size, and print which of them fits a 7B model on a card of 16 GB."""
    methods = {
        ("full fine-tuning, 12 bytes", "全參數微調，12 bytes"): 12.0,
        ("LoRA on 16 bits, 2 bytes", "16-bit 的 LoRA，2 bytes"): 2.0,
        ("QLoRA on NF4, 0.5 bytes", "NF4 的 QLoRA，0.5 bytes"): 0.5,
    }
    cards = {"RTX 5080, T4": "T4", "RTX 3090, 4090": "RTX 4090"}
    title = ("Weights, gradients and optimizer, without activations", "權重、梯度與優化器，不含激活值")
    with _memory_chart(title, (1, 3, 7, 13, 30), methods, cards):
        pass
    print_text(fits_on_card("7B", 16, 512))


@contextmanager
def _memory_chart(
    title: tuple[str, str], sizes: Sequence[int], bytes_each: Mapping[tuple[str, str], float], cards: Mapping[str, str]
) -> Iterator[Any]:
    """Draw a group of bars for each model size and a line at the memory of each card; yield the axes, then show them.

    Args:
        sizes: billions of parameters.
        bytes_each: bytes a parameter, by the label of the bar in both languages.
        cards: cards of planning/cards.py, by the names to be shown.
    """
    with drawing():
        _, axes = plt.subplots(figsize=(11, 5), layout="constrained")
        axes.set_yscale("log")
        width = 0.8 / len(bytes_each)
        for number, (label, color) in enumerate(zip(bytes_each, (BLUE, ORANGE, GREEN), strict=True)):
            places = [position + width * (number - 1) for position in range(len(sizes))]
            axes.bar(places, [bytes_each[label] * billions for billions in sizes], width, color=color, label=text(*label))
        axes.set_xticks(range(len(sizes)), [f"{billions}B" for billions in sizes])
        for shown, name in cards.items():
            gigabytes = CARDS[name].memory / GB
            axes.axhline(gigabytes, color=RED, linestyle="--", alpha=0.6)
            shown = f"{shown}: {CARDS[name].memory / GIB:g} GiB"
            axes.text(len(sizes) - 0.55, gigabytes, shown, color=RED, va="bottom", fontsize=9)
        axes.set_xlim(-0.6, len(sizes) + 0.4)
        axes.set_ylim(top=2 * axes.get_ylim()[1])
        axes.set(title=text(*title), xlabel=text(*PARAMETERS), ylabel=text("GB, 10⁹ bytes", "GB（10⁹ bytes）"))
        axes.legend(loc="upper left")
        yield axes
        plt.show()
