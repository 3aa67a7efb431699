"""A packed block against its records alone: equal losses and gradients, on the fast path and through the library."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from qlora_kit.fast.attention import BlockLayout, attend, find_offsets
from qlora_kit.fast.llama_layer import Rotary
from qlora_kit.fast.micro_step import MicroStep, StepSettings
from qlora_kit.fast.projection import draw_keys
from qlora_kit.fast.training_pass import FastDecoder
from qlora_kit.model.loss import token_losses
from qlora_kit.model.records import record_mask
from tests.fast.models import adapt, load_base, matrices
from tests.model.random_models import build_model

LENGTH = 24
RECORDS = [[7, 9, 5], [3, 11, 10]]  # lengths of the records in two blocks; the rest is padding


def block_of(lengths, generator):
    """ids, labels and starts of one block; the first token of a record and the padding have no label."""
    ids = torch.randint(6000, (LENGTH,), generator=generator)
    labels, starts, at = ids.clone(), torch.zeros(LENGTH, dtype=torch.long), 0
    for length in lengths:
        labels[at] = -100
        starts[at : at + length] = at
        at += length
    labels[at:], starts[at:] = -100, at
    return ids, labels, starts


@pytest.fixture
def blocks():
    generator = torch.Generator().manual_seed(0)
    return [torch.stack(rows) for rows in zip(*(block_of(lengths, generator) for lengths in RECORDS), strict=True)]


def split_records(ids, labels):
    """Row, start, ids and labels, (1, length), of each record of the blocks."""
    for row, lengths in enumerate(RECORDS):
        at = 0
        for length in lengths:
            yield row, at, ids[row : row + 1, at : at + length], labels[row : row + 1, at : at + length]
            at += length


@pytest.mark.parametrize("four_bits", [True, False])
def test_losses_of_a_packed_block_are_those_of_its_records_split_records(tiny_dir, blocks, four_bits):
    model = adapt(load_base(tiny_dir, four_bits=four_bits))
    ids, labels, starts = blocks
    with torch.no_grad():
        library = token_losses(model.eval(), ids, labels, starts)
        unmasked = token_losses(model, ids, labels)  # each record attends to those before it
        fast = FastDecoder(model, 0, compiled=False).losses(ids, labels, starts)[:, :-1]
        for row, at, record, label in split_records(ids, labels):
            expected = model(input_ids=record).logits[0, :-1].log_softmax(-1).gather(1, label[0, 1:, None])[:, 0].neg()
            here = slice(at, at + record.shape[1] - 1)
            for losses in (library, fast):
                torch.testing.assert_close(losses[row, here], expected, rtol=1e-4, atol=1e-5)
            assert at == 0 or not torch.allclose(unmasked[row, here], expected, rtol=1e-2)
    assert (library != 0).sum() == (fast != 0).sum() == (labels != -100).sum()


@pytest.mark.parametrize("recomputed", [0, 6])
def test_gradients_of_a_packed_block_are_the_sum_of_those_of_its_records(tiny_dir, blocks, recomputed):
    model = adapt(load_base(tiny_dir))
    ids, labels, starts = blocks
    loss_scale = 1.0 / (labels != -100).sum()
    loss = (
        sum(model(input_ids=r, labels=t).loss * (t[:, 1:] != -100).sum() for _, _, r, t in split_records(ids, labels))
        * loss_scale
    )
    loss.backward()
    expected = {name: matrix.grad.clone() for name, matrix in matrices(model).items()}
    model.zero_grad()
    (token_losses(model, ids, labels, starts).sum() * loss_scale).backward()
    for name, matrix in matrices(model).items():
        assert (matrix.grad - expected[name]).norm() < 1e-4 * expected[name].norm(), name
    decoder = FastDecoder(model, recomputed, compiled=False)
    decoder.adapters.clear_gradients()
    keys = draw_keys((0,), 24).view(-1, 4)
    assert decoder.accumulate(ids, labels, loss_scale, keys, starts).item() == pytest.approx(loss.item(), rel=1e-5)
    for name, matrix in matrices(model).items():
        assert (decoder.adapters.gradient_of(matrix) - expected[name]).norm() < 1e-4 * expected[name].norm(), name


def test_offsets_say_where_each_record_begins(blocks):
    assert find_offsets(blocks[2], 4).tolist() == [0, 7, 16, 21, 24, 27, 38, 48, 48]  # the second block has no padding
    assert find_offsets(blocks[2][:1], 6).tolist() == [0, 7, 16, 21, 24, 24, 24]


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_flash_attention_within_offsets_is_that_of_the_dense_mask(kv_heads):
    """Longer records than a tile of the kernel, records of one token, and padding; the gradients too."""
    counts = torch.tensor([[1, 300, 130, 1, 70, 10], [512, 0, 0, 0, 0, 0], [255, 257, 0, 0, 0, 0]])
    begins = counts.cumsum(1) - counts
    starts = torch.stack([row.repeat_interleave(count) for row, count in zip(begins, counts, strict=True)]).cuda()

    def random(count):
        return torch.randn(3, 512, count, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    torch.manual_seed(0)
    heads, dy = [random(count) for count in (8, kv_heads, kv_heads)], random(8)
    rotary = Rotary(torch.empty(0), torch.empty(0))
    layouts = [
        BlockLayout(3, rotary, offsets=find_offsets(starts, 6)),
        BlockLayout(3, rotary, mask=record_mask(starts, torch.bfloat16)),
        BlockLayout(3, rotary, mask=record_mask(starts, torch.float32)),
    ]
    results = []
    for layout, dtype in zip(layouts, (torch.bfloat16, torch.bfloat16, torch.float32), strict=True):
        own = [head.detach().clone().to(dtype) for head in heads]
        y = attend(tuple(own), layout, differentiable=True)
        results.append([y.float(), *(grad.float() for grad in torch.autograd.grad(y, own, dy.to(y.dtype)))])
    for by_offsets, by_mask, exact in zip(*results, strict=True):
        assert (by_offsets - exact).norm() < 1.5 * (by_mask - exact).norm() < 0.02 * exact.norm()


def test_a_smaller_micro_batch_uses_the_starts_of_its_own_records(tiny_dir, blocks):
    ids, labels, starts = blocks
    decoder = FastDecoder(adapt(load_base(tiny_dir)), 0, compiled=False)
    micro = MicroStep(decoder, StepSettings(2, LENGTH, seed=0, captured=False, most_records=4))
    together = micro.losses(ids, labels, starts).clone()
    for row in (1, 0):
        one = slice(row, row + 1)
        torch.testing.assert_close(micro.losses(ids[one], labels[one], starts[one]), together[one])
    assert micro.smaller(1).starts.shape == (1, LENGTH)


def test_the_librarys_layers_keep_the_records_of_other_architectures_apart(blocks):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=6144)).eval()
    ids, labels, starts = blocks
    with torch.no_grad():
        packed = token_losses(model, ids, labels, starts)
        for row, at, record, label in split_records(ids, labels):
            torch.testing.assert_close(packed[row, at : at + record.shape[1] - 1], token_losses(model, record, label)[0])


def test_rotary_angles_are_those_of_a_text_of_the_records_length(blocks):
    """With longrope, texts of more than 8 tokens have other angles: in these blocks some records do, and some do not."""
    llama = build_model("llama")
    llama.config.rope_parameters["original_max_position_embeddings"] = 8
    model = adapt(llama)
    ids, labels, starts = blocks
    with torch.no_grad():
        fast = FastDecoder(model, 0, compiled=False)
        losses = fast.losses(ids, labels, starts)[:, :-1]
        for row, at, record, label in split_records(ids, labels):
            expected = token_losses(model.eval(), record, label)[0]
            torch.testing.assert_close(losses[row, at : at + record.shape[1] - 1], expected, rtol=1e-4, atol=1e-5)
        whole = fast.losses(ids, ids)[:, :-1]
        torch.testing.assert_close(whole, token_losses(model, ids, ids), rtol=1e-4, atol=1e-5)
