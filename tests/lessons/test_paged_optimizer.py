"""Test the lesson of the optimizer's state: bytes by hand, and the tensors that bitsandbytes pages."""

import pytest
import torch
from torch import nn

from finetuning_lessons.paged_optimizer import (
    NARROW,
    OPTIMIZERS,
    PAGED,
    PAGED_FROM,
    WIDE,
    join_parameters,
    load_adapted_model,
    measure_state,
    movable_gib,
    paged_share,
    qwen_rows,
    train_with,
    trainable_parameters,
)
from finetuning_lessons.short_run import load_split
from qlora_kit.config import TrainingSettings
from qlora_kit.planning.shape import KNOWN_CONFIGS, read_shape

QWEN = read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"])


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        (WIDE, 8192, 2 * 4 * 8192),
        (NARROW, 8192, 2 * (8192 + 4 * 8192 // 256)),  # a byte each, and an fp32 absmax for 256
        (PAGED, 8192, 2 * (8192 + 4 * 8192 // 256)),
        (NARROW, 4095, 2 * 4 * 4095),  # small tensors stay in 32 bits
    ],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_state_by_hand(name, size, expected):
    state = measure_state(name, [nn.Parameter(torch.ones(size))])
    assert (state.bytes, state.parameters) == (expected, size)


def test_joined_tensor_holds_the_same_numbers():
    pieces = [nn.Parameter(torch.tensor([[1.0, 2.0]])), nn.Parameter(torch.tensor([3.0]))]
    assert [one.tolist() for one in join_parameters(pieces)] == [[1.0, 2.0, 3.0]]


def test_paged_share_by_hand():
    """Rank 16: 11008 · 16 is paged, 2048 · 16 and less is not; three projections have a side of 11008."""
    widths = 3 * 11008
    others = 4 * 2048 + 2 * (2048 + 256) + 3 * 2048  # q and o; k and v; the other sides of gate, up and down
    assert paged_share(QWEN, 16) == pytest.approx(widths / (widths + others))
    assert paged_share(QWEN, 8) == 0 and paged_share(QWEN, 512) == 1


def test_what_paging_can_move_is_the_state_of_the_memory_lesson():
    state, rest = movable_gib(QWEN)["full"]
    assert state * 2**30 == 8 * QWEN.parameters() and rest * 2**30 > 4 * QWEN.parameters()
    state, rest = movable_gib(QWEN)["QLoRA"]
    assert state / (state + rest) < 0.02


def test_bitsandbytes_pages_tensors_from_that_size_on(monkeypatch):
    class Paged(Exception):
        pass

    def no_gpu(*shape, **where):
        raise Paged

    monkeypatch.setattr("bitsandbytes.functional.get_paged", no_gpu)
    optimizer = OPTIMIZERS[PAGED]([nn.Parameter(torch.ones(1))])
    not_on_a_cpu = torch.device("meta")
    optimizer.get_state_buffer(torch.empty(PAGED_FROM - 1, device=not_on_a_cpu))
    with pytest.raises(Paged):
        optimizer.get_state_buffer(torch.empty(PAGED_FROM, device=not_on_a_cpu))


def test_qwen_rows_by_hand():
    rank_16 = qwen_rows(QWEN)[1]
    assert rank_16[:4] == ["LoRA, rank 16", "29,933,568", "114", "228"]
    bits_8 = float(rank_16[4])
    assert bits_8 * 2**20 == pytest.approx(TrainingSettings(optim="adamw_8bit").optimizer_bytes * 29_933_568, rel=0.02)


def test_8_bits_train_like_32():
    blocks, losses = load_split().train[:, :32], {}
    for name in (WIDE, NARROW):
        losses[name] = train_with(name, load_adapted_model(0), blocks, steps=4)
    assert losses[WIDE][0] == losses[NARROW][0]
    assert losses[WIDE] != losses[NARROW]
    assert losses[NARROW] == pytest.approx(losses[WIDE], abs=0.01)


def test_lora_of_the_embedded_model_is_84_tensors():
    assert len(trainable_parameters(load_adapted_model(0))) == 6 * 7 * 2
