"""Count the weights of projections, packed or not, against numbers worked out by hand."""

import pytest

from qlora_kit.config import ModelSettings
from qlora_kit.model.projections import count_packed
from qlora_kit.model.skeleton import build_skeleton, pack_skeleton
from tests.model.saved_models import save_model

ATTENTION = 2 * (2 * 64 * 64 + 2 * 64 * 32)  # two layers: q and o are 64 x 64, k and v 32 x 64
ROUTERS, EXPERTS = 2 * 4 * 64, 2 * 4 * 3 * 64 * 128  # gate, up and down of four experts


@pytest.mark.parametrize("name, packed, left", [
    ("llama", ATTENTION + 2 * 3 * 64 * 128, {}),
    ("mixtral", ATTENTION, {"experts": EXPERTS, "gate": ROUTERS}),
    ("falcon", 2 * (64 * (64 + 2 * 16) + 64 * 64 + 2 * 64 * 256), {}),  # one head of k and v; dense; an MLP four times as wide
    ("mamba", 2 * 64 * 256, {"out_proj": 2 * 128 * 64, "x_proj": 2 * 128 * (64 + 2 * 8), "dt_proj": 2 * 64 * 128}),
])  # fmt: skip
def test_weights_in_4_bits_and_others_are_counted_by_kind(name, packed, left):
    model = build_skeleton(ModelSettings(name=str(save_model(name))))
    assert count_packed(model).packed == 0 and count_packed(model).weights == packed + sum(left.values())
    pack_skeleton(model)
    packing = count_packed(model)
    assert (packing.packed, dict(packing.unpacked)) == (packed, left)
    assert packing.as_json() == {"weights": packed + sum(left.values()), "weights_in_4bit": packed, "other_weights": left}


def test_the_line_names_what_stays_in_16_or_32_bits():
    model = build_skeleton(ModelSettings(name=str(save_model("mixtral"))))
    pack_skeleton(model)
    assert str(count_packed(model)) == (
        "24,576 of 221,696 weights in 4 bits; 197,120 of 221,696 stay in 32 bits: experts (196,608), gate (512)"
    )
    whole = build_skeleton(ModelSettings(name=str(save_model("llama"))))
    pack_skeleton(whole)
    assert str(count_packed(whole)) == "all 73,728 weights in 4 bits"
