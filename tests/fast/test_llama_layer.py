"""The written-out backward passes against autograd through the written-out forward passes, in fp64."""

import pytest
import torch
import torch.nn.functional as F

from qlora_kit.fast import llama_layer
from qlora_kit.fast.llama_layer import Norms, Rotary, UnpackedGroup
from qlora_kit.fast.mlp_activation import (
    activate,
    activate_backward,
    activate_backward_triton,
    activate_triton,
    add_sums,
    has_kernels,
)
from qlora_kit.fast.nf4 import unpack_stacked
from qlora_kit.fast.projection import Lora

BATCH, LENGTH, HIDDEN, HEAD, MLP = 2, 5, 12, 4, 10
KEY = torch.tensor(77, dtype=torch.int32)
GENERATOR = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def group(fan_in, *sizes):
    """Projections with LoRA of rank 2 and dropout; the weight contains the differentiable B, so that autograd reaches them."""
    weights = tuple(random(size, fan_in) for size in sizes)
    A, B = random(2 * len(sizes), fan_in).requires_grad_(), tuple(random(size, 2).requires_grad_() for size in sizes)
    lora = Lora(A, B, sizes, 0.5, 0.75)
    width = 8 * -(-2 * len(sizes) // 8)
    right = F.pad(torch.block_diag(*B), (0, width - 2 * len(sizes)))
    assert torch.equal(torch.cat([torch.cat(weights), right], 1), unpack_stacked(weights, B, 2, torch.float64))
    gradients = lora._replace(A=torch.zeros_like(A), B=tuple(torch.zeros_like(b) for b in B))
    return UnpackedGroup(torch.cat([torch.cat(weights), right], 1), random(sum(sizes)), lora, gradients, KEY)


def detach(p: UnpackedGroup) -> UnpackedGroup:
    """The same group, cut off from autograd."""
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
    h, qkv, norm = random(BATCH * LENGTH, HIDDEN).requires_grad_(), group(HIDDEN, *sizes), norms(with_heads)
    heads, _, _ = llama_layer.attention_input(h, BATCH, sizes, qkv, norm, rotary)
    assert [tuple(x.shape) for x in heads] == [(2, 2, 5, 4), (2, 1, 5, 4), (2, 1, 5, 4)]
    upstream, dh = tuple(random(*x.shape) for x in heads), random(*h.shape)
    with torch.no_grad():
        _, xa, product = llama_layer.attention_input(h, BATCH, sizes, detach(qkv), norm, rotary)
        dproduct = torch.cat(llama_layer.heads_backward(upstream, product, sizes, norm, rotary), 1)
        actual = llama_layer.attention_input_backward(dh, dproduct, h, xa, detach(qkv), norm)
    assert (product is not None) == with_heads
    assert_gradients(heads, upstream, [h], [actual - dh], qkv)  # dh is the gradient along the residual path


def test_mlp():
    h, attended = random(BATCH * LENGTH, HIDDEN).requires_grad_(), random(BATCH, 2, LENGTH, HEAD).requires_grad_()
    o, gate_up, down, norm = group(8, HIDDEN), group(HIDDEN, MLP, MLP), group(MLP, HIDDEN), norms()
    middle, gates, _, _ = llama_layer.mlp_input(h, attended, o, gate_up, norm)
    out, _ = llama_layer.mlp_output(middle, *activate(gates, down.lora, KEY), down)
    upstream = random(*out.shape)
    with torch.no_grad():
        o_, gate_up_, down_ = detach(o), detach(gate_up), detach(down)
        middle, gates, o_xa, gate_up_xa = llama_layer.mlp_input(h, attended, o_, gate_up_, norm)
        _, down_xa = llama_layer.mlp_output(middle, *activate(gates, down_.lora, KEY), down_)
        dy, u = llama_layer.mlp_output_backward(upstream, down_xa, down_)
        dgates, sums = activate_backward(dy, u, gates, gate_up_xa, KEY, down_.lora, gate_up_.lora)
        add_sums(sums, down_.gradients, gate_up_.gradients)
        actual = llama_layer.mlp_input_backward(upstream, dgates, middle, attended, o_xa, o_, gate_up_, norm)
    assert_gradients(out, upstream, [h, attended], actual, o, gate_up, down)


def test_rms_norm_equals_torchs_and_gradcheck():
    x, weight = random(4, HIDDEN).requires_grad_(), random(HIDDEN)
    torch.testing.assert_close(llama_layer.rms_norm(x, weight, 1e-6), F.rms_norm(x, (HIDDEN,), weight, 1e-6))
    upstream = random(4, HIDDEN)
    (expected,) = torch.autograd.grad(F.rms_norm(x, (HIDDEN,), weight, 1e-6), x, upstream)
    torch.testing.assert_close(llama_layer.rms_norm_backward(upstream, x, weight, 1e-6), expected)


def make_lora(rank, sizes, adapted, fan_in, keep, dtype):
    """LoRA on the GPU, A rounded to `dtype`, for the projections whose flag in `adapted` is 1; None if there are none."""
    if not any(adapted):
        return None
    A = (torch.randn(rank * sum(adapted), fan_in, device="cuda") / 10).to(dtype).float()
    B = tuple(torch.zeros(size, rank, device="cuda") if has else None for size, has in zip(sizes, adapted, strict=True))
    return Lora(A, B, sizes, 2.0, keep)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, mlp, rank, keep", [(150, 300, 16, 0.95), (2100, 128, 8, 0.5), (64, 1200, 64, 1.0)])
@pytest.mark.parametrize("adapted", [(1, 1, 1), (1, 0, 1), (0, 1, 0), (1, 1, 0), (0, 0, 1), (0, 0, 0)], ids=str)  # gate, up, down
def test_the_kernels_compute_what_the_steps_compute_in_fp32(rows, mlp, rank, keep, adapted, dtype):
    torch.manual_seed(0)
    down, gate_up = make_lora(rank, (7,), adapted[2:], mlp, keep, dtype), make_lora(rank, (mlp, mlp), adapted[:2], 5, keep, dtype)
    gates, dy = torch.randn(rows, 2 * mlp, device="cuda").to(dtype), torch.randn(rows, mlp, device="cuda").to(dtype)
    u = None if down is None else torch.randn(rows, rank, device="cuda").to(dtype)
    xa = None if gate_up is None else torch.randn(rows, len(gate_up.A), device="cuda").to(dtype)
    assert has_kernels(gates, down, gate_up)

    def run(forward, backward, kind):
        def convert(tensor):
            return tensor if tensor is None else tensor.to(kind)

        y, parts = forward(convert(gates), down, KEY.cuda())
        dgates, sums = backward(convert(dy), convert(u), convert(gates), convert(xa), KEY.cuda(), down, gate_up)
        return [y, dgates, *(None if part is None else part.sum(0) for part in (parts, *sums))]

    by_kernel, in_steps = run(activate_triton, activate_backward_triton, dtype), run(activate, activate_backward, torch.float32)
    for actual, expected in zip(by_kernel, in_steps, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual.float(), expected, rtol=0.02, atol=0.01 * expected.abs().max().item())
