"""The memory and the rates of graphics cards, by name."""

import re
from dataclasses import dataclass

from qlora_kit.config import GIB
from qlora_kit.errors import UserError, closest, did_you_mean


@dataclass(frozen=True)
class Card:
    """A graphics card.

    Attributes:
        memory: bytes.
        flops: operations per second of dense 16-bit matrix products with fp32 sums.
        bandwidth: bytes per second between the card's memory and its processors.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float


# GiB, TFLOP/s and GB/s, as NVIDIA states them: the whitepapers of Turing (T4), GA100 (A100), GA102 (RTX 30), Ada (RTX 40) and
# Hopper (H100, H200). A whitepaper names the largest card of a family; the rates of the RTX 3060 and 4060 are that card's, times
# multiprocessors and boost clock over its own.
CARDS = {
    name: Card(name, memory * GIB, flops * 1e12, bandwidth * 1e9)
    for name, memory, flops, bandwidth in (
        ("RTX 3060", 12, 25.5, 360),
        ("RTX 3070", 8, 40.6, 448),
        ("RTX 3090", 24, 71.2, 936),
        ("RTX 4060", 8, 30.2, 272),
        ("RTX 4090", 24, 165.2, 1008),
        ("T4", 16, 65, 320),
        ("A100 40GB", 40, 312, 1555),
        ("A100 80GB", 80, 312, 2039),
        ("H100", 80, 989, 3350),
        ("H200", 141, 989, 4800),
    )
}


def find_card(name: str) -> Card:
    """Return the card of a name, which may be written as "4060", "RTX-4060" or "NVIDIA GeForce RTX 4060".

    Raises:
        UserError: no card of the table has this name.
    """
    wanted = _simplify(name)
    names = {_simplify(known): card for known, card in CARDS.items()}
    if wanted in names:
        return names[wanted]
    close = closest(wanted, names)
    guess = did_you_mean(names[close].name if close else None)
    raise UserError("--gpu", name, f"is not in the table of cards{guess}", f"use one of {', '.join(CARDS)}")


def _simplify(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|rtx|[^a-z0-9]", "", name.lower())
