"""Records that share a block against plain transformers on each record alone, for layers that a causal mask does not describe."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qlora_kit.model import packing_check
from qlora_kit.model.loss import token_losses
from qlora_kit.model.packing_check import lay_out_exactly, needs_marks, why_not_packed
from qlora_kit.model.records import layer_masks, longest_short_text, positions, record_lengths, record_mask
from quantization_utils import create_lora_config, prepare_model_for_training
from tests.data.builders import record_blocks
from tests.model.random_models import BY_LENGTH, NOT_PACKED, WINDOWED, build_model

LENGTHS = [5, 30, 1, 20]  # of records: some shorter and some longer than every window; the rest of the block is padding
T = 64
TOKENS = np.random.default_rng(0).integers(0, 6000, T)


@pytest.fixture
def block():
    """Return ids, labels and starts of one block, (1, T)."""
    ids, starts, at = torch.from_numpy(TOKENS)[None], torch.zeros(1, T, dtype=torch.long), 0
    for length in [*LENGTHS, T - sum(LENGTHS)]:
        starts[:, at : at + length] = at
        at += length
    labels = ids.masked_fill(starts == torch.arange(T), -100)
    labels[:, sum(LENGTHS) :] = -100
    return ids, labels, starts


def losses_alone(model, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Return the losses that transformers computes for each record by itself, (T - 1,); zero for other tokens."""
    losses, at = torch.zeros(ids.shape[1]), 0
    for length in lengths:
        record = ids[:, at : at + length]
        logits = model(input_ids=record, use_cache=False).logits[0, :-1].float()
        losses[at : at + length - 1] = F.cross_entropy(logits, record[0, 1:], reduction="none")
        at += length
    return losses[:-1]


@pytest.mark.parametrize("name", [*WINDOWED, *BY_LENGTH])
@torch.no_grad()
def test_a_record_in_a_block_is_computed_as_transformers_computes_it_alone(block, name):
    model = build_model(name)
    expected = losses_alone(model, block[0], LENGTHS)
    torch.testing.assert_close(token_losses(model, *block)[0], expected, rtol=0, atol=1e-5)
    assert why_not_packed(model, TOKENS) is None


@pytest.mark.parametrize("name", BY_LENGTH)
@torch.no_grad()
def test_padding_does_not_make_a_record_long(name):
    model, blocks = build_model(name), record_blocks("ppaaaaaa", max_length=T, packing=False)
    assert needs_marks(model, T) and not needs_marks(model, 16)
    blocks, reason = lay_out_exactly(model, blocks, {})
    item = {key: row[None] for key, row in blocks[0].items() if key != "block"}
    losses = token_losses(model, item["input_ids"], item["labels"], item["starts"])[0]
    expected = losses_alone(model, item["input_ids"], [8]) * (item["labels"][0, 1:] != -100)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    assert reason is None


@pytest.mark.parametrize("name", NOT_PACKED)
def test_a_model_that_no_mask_serves_is_found_out(name):
    reason = why_not_packed(build_model(name), TOKENS)
    crashed = {"bloom": "ValueError: too many values to unpack", "mamba": "RuntimeError: The size of tensor"}
    expected = f"cannot compute several records in a block ({crashed[name]}" if name in crashed else "the loss of a token is"
    assert reason and expected in reason and "\n" not in reason


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "bloom"])
@torch.no_grad()
def test_one_record_in_each_block_is_exact_for_them(name):
    model = build_model(name)
    blocks, reason = lay_out_exactly(model, record_blocks("ppaaaa", "paaaaaaa", max_length=T), {})
    assert reason and len(blocks) == 2 and "starts" not in blocks[0]
    for item, length in zip((blocks[0], blocks[1]), (6, 8), strict=True):
        ids, labels = item["input_ids"][None], item["labels"][None]
        expected = losses_alone(model, ids, [length]) * (labels[0, 1:] != -100)
        torch.testing.assert_close(token_losses(model, ids, labels)[0], expected, rtol=0, atol=1e-5)


def test_the_decision_of_the_run_is_kept_without_a_trial(monkeypatch):
    tried = []
    monkeypatch.setattr(packing_check, "why_not_packed", lambda *rest: tried.append(rest))
    model, packed = build_model("lfm2"), record_blocks("pa", "pa", "pa")
    for decision, count in ((True, 1), (False, 3)):
        blocks, reason = lay_out_exactly(model, packed, {"data": {"packed": decision}})
        assert (reason, len(blocks), blocks.packed) == (None, count, decision)
    assert not tried
    for other in ({}, {"data": None}, {"data": {"packed": None}}, {"data": {"packed": "no"}}):
        assert lay_out_exactly(model, packed, other) == (packed, None)
    assert len(tried) == 4


@pytest.mark.parametrize("length, longer", [(8, 6), (64, 56), (18, 16), (16, 14), (15, 13), (14, 12)])
def test_the_longer_record_of_a_trial_exceeds_the_window_where_the_block_allows(length, longer):
    assert packing_check.choose_border(build_model("gemma3"), length) == longer


def test_a_trial_draws_nothing_and_leaves_the_model_as_it_was():
    """Without adapter and dropout: B is not zero here, and dropout would change every loss."""
    base = build_model("lfm2").requires_grad_(False)
    expected = why_not_packed(base, TOKENS)
    model = prepare_model_for_training(base, create_lora_config(4, 8.0, 0.5, ["out_proj", "q_proj"]), False).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    random = torch.get_rng_state()
    assert why_not_packed(model, TOKENS) == expected
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gemma3", "qwen3_5"])
def test_rounding_to_16_bits_is_not_taken_for_a_leak(name, dtype):
    assert (why_not_packed(build_model(name).to(dtype), TOKENS) is None) == (name == "gemma3")


def test_a_full_gpu_is_no_property_of_the_model():
    def losses_of(ids, labels, starts):
        if starts is not None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(1, ids.shape[1] - 1)

    with pytest.raises(torch.cuda.OutOfMemoryError):
        why_not_packed(build_model("lfm2"), TOKENS, losses_of)


def test_positions_lengths_and_masks_by_hand():
    starts = torch.tensor([[0, 0, 2, 2, 2]])
    assert positions(starts).tolist() == [[0, 1, 0, 1, 2]]
    assert record_lengths(starts).tolist() == [[2, 2, 3, 3, 3]]

    def visible(**limits: int) -> list[list[int]]:
        return (record_mask(starts, torch.float32, **limits)[0, 0] == 0).int().tolist()

    assert visible() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert visible(window=2) == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert visible(chunk=2) == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


def test_only_a_block_longer_than_the_window_needs_several_masks():
    config = build_model("gemma3").config
    longer = layer_masks(config, torch.zeros(1, 13, dtype=torch.long), torch.float32)
    assert isinstance(longer, dict) and set(longer) == {"sliding_attention", "full_attention"}
    assert isinstance(layer_masks(config, torch.zeros(1, 12, dtype=torch.long), torch.float32), torch.Tensor)


def test_the_longest_short_text_is_found_in_the_config():
    config = build_model("phi3").config
    assert (longest_short_text(config, 16), longest_short_text(config, 17)) == (None, 16)
    assert longest_short_text(build_model("gemma3").config, 1000) is None


def test_blocks_of_the_same_records_are_unpacked_as_without_packing():
    records = ("ppaa", "pa", "ppppppppppaa", "pppaa", "aaaaaaaaaa")
    packed, apart = record_blocks(*records), record_blocks(*records, packing=False)
    unpacked = packed.unpack()
    assert unpacked.fingerprint() == apart.fingerprint() and (len(unpacked), unpacked.packed) == (4, False)
    assert packed.take(3).take(1).unpack().fingerprint() == apart.take(1).fingerprint()
    assert packed.sample().tolist() == [100, 101, 102, 103, 100, 101, 100, 101]
