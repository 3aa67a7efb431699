"""Test the lesson of memory: published sizes, the account by hand, and the measured points of the benchmarks."""

import pytest

from finetuning_lessons import memory
from finetuning_lessons.memory import CARDS_GIB, MEASURED, account_bytes, model_shapes, predicted_gib, rule_bytes, smallest_card
from qlora_kit.config import GIB
from qlora_kit.errors import UserError

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
    assert full["activations"] == lora["activations"] == qlora["activations"] > 0


def test_longer_text_and_less_recomputation_take_more():
    shape = model_shapes()["3B"]

    def needed(length: int, recomputed: int) -> float:
        return sum(account_bytes("QLoRA", shape, length, recomputed).values())

    assert needed(512, 36) < needed(2048, 36) < needed(2048, 0)


@pytest.mark.parametrize(("gib", "card"), [(0.5, "8 GiB"), (8, "8 GiB"), (8.01, "12 GiB"), (80, "80 GiB"), (81, "more than 80")])
def test_smallest_card(gib, card):
    assert smallest_card(gib * GIB) == card


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
    assert {row[-1] for row in rows} <= {f"{card} GiB" for card in CARDS_GIB} | {"more than 80"}


def test_length_that_is_too_short_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.max_length"):
        memory.main(["--length", "0", "--output_dir", str(tmp_path)])
