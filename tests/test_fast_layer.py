"""The hand-written backward passes against autograd through the hand-written forward ones, in fp64."""

import pytest
import torch
import torch.nn.functional as F

from qlora_kit.fast import layer as steps
from qlora_kit.fast.layer import Norms, Part, Rotary
from qlora_kit.fast.nf4 import unpack_stacked
from qlora_kit.fast.projection import Lora

BATCH, LENGTH, HIDDEN, HEAD, MLP = 2, 5, 12, 4, 10
KEY = torch.tensor(77, dtype=torch.int32)
GENERATOR = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def part(fan_in, *sizes):
    """Projections with LoRA of rank 2 and dropout; the weight is built again from A and B, so that autograd sees them."""
    weights = tuple(random(size, fan_in) for size in sizes)
    A, B = random(2 * len(sizes), fan_in).requires_grad_(), tuple(random(size, 2).requires_grad_() for size in sizes)
    lora = Lora(A, B, sizes, 0.5, 0.75)
    width = 8 * -(-2 * len(sizes) // 8)
    beside = F.pad(torch.block_diag(*B), (0, width - 2 * len(sizes)))
    assert torch.equal(torch.cat([torch.cat(weights), beside], 1), unpack_stacked(weights, B, 2, torch.float64))
    gradients = lora._replace(A=torch.zeros_like(A), B=tuple(torch.zeros_like(b) for b in B))
    return Part(torch.cat([torch.cat(weights), beside], 1), random(sum(sizes)), lora, gradients, KEY)


def frozen(p: Part) -> Part:
    """For the hand-written pass, which runs without autograd."""
    return p._replace(weight=p.weight.detach(), lora=p.lora._replace(A=p.lora.A.detach(), B=tuple(b.detach() for b in p.lora.B)))


def norms(with_heads=False):
    heads = (random(HEAD), random(HEAD)) if with_heads else (None, None)
    return Norms(random(HIDDEN), random(HIDDEN), *heads, 1e-6)


def assert_gradients(outputs, upstream, inputs, actual, *parts):
    expected = torch.autograd.grad(outputs, [*inputs, *(t for p in parts for t in (p.lora.A, *p.lora.B))], upstream)
    torch.testing.assert_close(tuple(actual), expected[: len(inputs)])
    added = [t for p in parts for t in (p.gradients.A, *p.gradients.B)]
    torch.testing.assert_close(tuple(added), expected[len(inputs) :])


@pytest.fixture
def rotary():
    angles = torch.outer(torch.arange(LENGTH, dtype=torch.float64), torch.tensor([1.0, 0.1]))
    angles = torch.cat([angles, angles], 1)
    return Rotary(angles.cos(), angles.sin() * torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("with_heads", [False, True], ids=["plain", "norm over each head"])
def test_attention_input(rotary, with_heads):
    sizes = (8, 4, 4)  # two heads of q, one of k and v
    h, qkv, norm = random(BATCH * LENGTH, HIDDEN).requires_grad_(), part(HIDDEN, *sizes), norms(with_heads)
    heads, _ = steps.attention_input(h, BATCH, sizes, qkv, norm, rotary)
    assert [tuple(x.shape) for x in heads] == [(2, 2, 5, 4), (2, 1, 5, 4), (2, 1, 5, 4)]
    upstream, dh = tuple(random(*x.shape) for x in heads), random(*h.shape)
    with torch.no_grad():
        _, product = steps.attention_input(h, BATCH, sizes, frozen(qkv), norm, rotary)
        actual = steps.attention_input_backward(dh, upstream, h, product, sizes, frozen(qkv), norm, rotary)
    assert (product is not None) == with_heads
    assert_gradients(heads, upstream, [h], [actual - dh], qkv)  # dh came along the residual path


def test_mlp_input():
    h, attended = random(BATCH * LENGTH, HIDDEN).requires_grad_(), random(BATCH, 2, LENGTH, HEAD).requires_grad_()
    o, gate_up, norm = part(8, HIDDEN), part(HIDDEN, MLP, MLP), norms()
    outputs = steps.mlp_input(h, attended, o, gate_up, norm)
    upstream = tuple(random(*x.shape) for x in outputs)
    with torch.no_grad():
        actual = steps.mlp_input_backward(
            upstream[0], upstream[1].chunk(2, 1), outputs[0], attended, frozen(o), frozen(gate_up), norm
        )
    assert_gradients(outputs, upstream, [h, attended], actual, o, gate_up)


def test_mlp_output():
    middle, gate_up = random(BATCH * LENGTH, HIDDEN), random(BATCH * LENGTH, 2 * MLP).requires_grad_()
    down = part(MLP, HIDDEN)
    out = steps.mlp_output(middle, gate_up, down)
    upstream = random(*out.shape)
    with torch.no_grad():
        actual = torch.cat(steps.mlp_output_backward(upstream, gate_up, frozen(down)), 1)
    assert_gradients(out, upstream, [gate_up], [actual], down)


def test_rms_norm_equals_torchs_and_gradcheck():
    x, weight = random(4, HIDDEN).requires_grad_(), random(HIDDEN)
    torch.testing.assert_close(steps.rms_norm(x, weight, 1e-6), F.rms_norm(x, (HIDDEN,), weight, 1e-6))
    upstream = random(4, HIDDEN)
    (expected,) = torch.autograd.grad(F.rms_norm(x, (HIDDEN,), weight, 1e-6), x, upstream)
    torch.testing.assert_close(steps.rms_norm_backward(upstream, x, weight, 1e-6), expected)
