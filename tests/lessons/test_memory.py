"""Test the lesson of memory: published sizes, the account by hand, and the measured points of the benchmarks."""

import pytest

from finetuning_lessons import memory
from finetuning_lessons.memory import (
    CARDS,
    MEASURED,
    account_bytes,
    fits_on_card,
    gib,
    model_shapes,
    predicted_gib,
    rule_bytes,
    smallest_card,
)
from finetuning_lessons.words import choose
from qlora_kit.config import GIB
from qlora_kit.errors import UserError
from qlora_kit.planning import cards

# Counted from the published weights.
PUBLISHED = {
    "1B": 1_235_814_400,
    "3B": 3_085_938_688,
    "7B": 6_738_415_616,
    "13B": 13_015_864_320,
    "30B": 32_528_943_616,
    "70B": 68_976_648_192,
}


def test_shapes_have_the_published_parameters():
    assert {name: shape.parameters() for name, shape in model_shapes().items()} == PUBLISHED


def test_rule_is_bytes_a_parameter():
    shape = model_shapes()["7B"]
    assert [rule_bytes(method, shape) for method in ("full", "LoRA", "QLoRA")] == [
        12 * 6_738_415_616,
        2 * 6_738_415_616,
        6_738_415_616 / 2,
    ]


def test_account_of_7b_by_hand():
    """Llama 2 7B: projections 32 · (4 · 4096² + 3 · 4096 · 11008), two embeddings of 32,000 x 4,096, 65 norms of 4,096."""
    shape = model_shapes()["7B"]
    projections, others = 6_476_005_376, 2 * 32_000 * 4096 + 65 * 4096
    adapters = 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    full, lora, qlora = (account_bytes(method, shape, 512, 32) for method in ("full", "LoRA", "QLoRA"))
    assert full["weights"] == 2 * (projections + others)
    assert full["gradients"] == 2 * (projections + others) and full["optimizer"] == 8 * (projections + others)
    assert lora["weights"] == 2 * (projections + others) + 4 * adapters
    assert lora["gradients"] == 4 * adapters and lora["optimizer"] == 8 * adapters
    assert qlora["weights"] == pytest.approx(4.127 / 8 * projections + 2 * others + 4 * adapters, rel=1e-4)
    assert qlora["optimizer"] == 2 * adapters
    assert full["rest"] == lora["rest"] == qlora["rest"] > 0.6 * GIB


def test_longer_text_and_less_recomputation_take_more():
    shape = model_shapes()["3B"]

    def needed(length: int, recomputed: int) -> float:
        return sum(account_bytes("QLoRA", shape, length, recomputed).values())

    assert needed(512, 36) < needed(2048, 36) < needed(2048, 0)


@pytest.mark.parametrize(
    ("size", "card"),
    [(0.5, "RTX 4060, 3070"), (8, "RTX 4060, 3070"), (8.01, "RTX 3060"), (80, "A100 80GB"), (81, "none of them")],
)
def test_smallest_card(size, card):
    assert smallest_card(size * GIB) == card


def test_cards_have_the_memory_that_the_planner_knows():
    short = {name.removeprefix("RTX "): int(card.memory / GIB) for name, card in cards.CARDS.items()}
    named = {name.removeprefix("RTX "): size for size, names in CARDS.items() for name in names.split(", ")}
    assert {name: size for name, size in named.items() if name in short} == {name: short[name] for name in named if name in short}
    assert len(named.keys() - short.keys()) == 1  # the RTX 5080, whose rates the planner does not know


def test_seven_billion_on_16_gb_is_answered_in_one_sentence_in_both_languages():
    assert fits_on_card("7B", 16, 512) == (
        "A 7B model on a card of 16 GB (RTX 5080, T4), at 1 x 512 tokens: QLoRA fits (5.23 GiB); LoRA barely fits (14.4 GiB); "
        "full fine-tuning does not fit (76.6 GiB)."
    )
    choose("zh-TW")
    try:
        assert "放得下：QLoRA（5.23 GiB）；勉強放得下：LoRA（14.4 GiB）；放不下：全參數微調（76.6 GiB）。" in fits_on_card(
            "7B", 16, 512
        )
    finally:
        choose("en")


@pytest.mark.parametrize(("number", "shown"), [(5.234, "5.23"), (14.41, "14.4"), (145.5, "146")])
def test_memory_is_shown_with_three_digits(number, shown):
    assert gib(number * GIB) == shown


def test_measured_points_are_those_of_the_benchmarks(root):
    text = (root / "benchmarks" / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    peaks = {cells[0]: float(cells[2]) for cells in rows if len(cells) == 5 and cells[3].endswith("%")}
    assert {point.run: point.peak_gib for point in MEASURED}.items() <= peaks.items()


@pytest.mark.parametrize("point", MEASURED, ids=lambda point: point.run)
def test_account_is_near_what_was_measured(point):
    assert predicted_gib(point) == pytest.approx(point.peak_gib, rel=0.08)


def test_every_size_and_method_has_a_row():
    rows = memory.account_rows(512)
    assert len(rows) == 18 and {row[1] for row in rows} == {"full", "LoRA", "QLoRA"}
    assert {row[-1] for row in rows} <= {*CARDS.values(), "none of them"}


def test_length_that_is_too_short_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.max_length"):
        memory.main(["--length", "0", "--output_dir", str(tmp_path)])
