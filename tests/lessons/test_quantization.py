"""Test 4 bits from scratch against bitsandbytes, bit for bit, and against numbers worked by hand."""

from statistics import NormalDist

import bitsandbytes.functional as bnb
import pytest
import torch

from finetuning_lessons.lesson import load_model
from finetuning_lessons.quantization import (
    QuantizedAbsmax,
    bits_per_weight,
    dynamic_levels,
    fp4_levels,
    int4_levels,
    nearest_codes,
    nf4_levels,
    pack,
    projection_weights,
    quantize,
    quantize_absmax,
    ratio_of_means,
    relative_error,
    scale_blocks,
    unpack,
)
from qlora_kit.planning.shape import BYTES_4BIT, BYTES_4BIT_DOUBLE


@pytest.fixture(scope="module")
def weights() -> list[torch.Tensor]:
    """Return real weights, and random ones whose sizes fill neither the last block nor the last group nor the last byte.

    No rows of a multiple of 16 that is none of 64: bitsandbytes 0.50.2 unpacks those with the absmax of a neighbour on
    processors with AVX-512.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [((300, 200), 0.02), ((77, 90), 30.0), ((1, 33), 1.0)]
    random = [scale * torch.randn(*size, generator=generator) for size, scale in sizes]
    return [*(weight.detach() for weight in projection_weights(load_model())[:14]), *random]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def test_nf4_levels_are_those_of_bitsandbytes_and_of_the_normal_distribution():
    assert same_bits(nf4_levels(), bnb.get_4bit_type("nf4", device="cpu"))
    quantile, last = NormalDist().inv_cdf, 1 - (1 / 30 + 1 / 32) / 2
    below = [-quantile(last + (0.5 - last) * step / 7) / quantile(last) for step in range(7)]
    above = [quantile(last + (0.5 - last) * step / 8) / quantile(last) for step in range(8)]
    assert nf4_levels().tolist() == pytest.approx(sorted([*below, 0.0, *above]), abs=1e-6)


def test_fp4_levels_worked_by_hand():
    positive = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    assert (12 * fp4_levels()).tolist() == pytest.approx([*positive, *(-level for level in positive)])
    assert same_bits(fp4_levels(), bnb.get_4bit_type("fp4", device="cpu"))


def test_int4_levels_are_evenly_spaced():
    assert int4_levels().diff().tolist() == pytest.approx([1 / 7] * 14)
    assert int4_levels().abs().max() == 1 and 0 in int4_levels()


def test_dynamic_levels_are_those_of_bitsandbytes():
    assert same_bits(dynamic_levels(), bnb.create_dynamic_map())


def test_blocks_worked_by_hand():
    scaled, absmax = scale_blocks(torch.tensor([1.0, -4.0, 0.0, 0.0, 3.0]), 2)
    assert absmax.tolist() == [4, 0, 3]
    assert scaled.tolist() == [[0.25, -1], [0, 0], [1, 0]]  # a block of zeros, and one that is filled up


def test_nearest_level_and_halfway_the_lower():
    levels = torch.tensor([0.0, 1.0, -1.0])  # in no order, as FP4's
    values = torch.tensor([[-1.0, -0.51, -0.5, -0.49], [0.2, 0.5, 0.51, 1.0]])
    assert nearest_codes(values, levels).tolist() == [[2, 2, 2, 0], [0, 0, 1, 1]]


def test_packing_worked_by_hand_and_back():
    codes = torch.tensor([1, 2, 15, 0], dtype=torch.uint8)
    assert pack(codes).tolist() == [0x12, 0xF0]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack(unpack(every)), every)
    assert unpack(every).max() == 15


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_absmax_and_weights_are_those_of_bitsandbytes(weights, kind, dtype):
    for weight in (weight.to(dtype) for weight in weights):
        ours = quantize(weight, kind)
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind)
        assert same_bits(ours.packed, packed.flatten())
        assert same_bits(ours.absmax, state.absmax)
        if weight.shape[-1] % 2 == 0:  # else bitsandbytes compiles another kernel, for seconds
            assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantization_is_that_of_bitsandbytes(weights, kind):
    for weight in weights[:-1]:
        ours = quantize(weight, kind, double_quant=True)
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=True)
        assert isinstance(ours.absmax, QuantizedAbsmax)
        assert same_bits(ours.absmax.codes, state.absmax)
        assert same_bits(ours.absmax.scale, state.state2.absmax)
        assert same_bits(ours.absmax.mean, state.offset)
        assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state))


@pytest.mark.gpu
def test_on_a_gpu_nf4_is_that_of_bitsandbytes_there(weights):
    for weight in (weight.cuda() for weight in weights[:-1]):
        ours = quantize(weight, "nf4", double_quant=True)
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        assert torch.equal(ours.packed, packed.flatten())
        assert torch.equal(ours.absmax.codes, state.absmax)
        assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state))


@pytest.mark.gpu
def test_on_a_gpu_fp4_is_that_of_bitsandbytes_there_but_for_ties(weights):
    """bitsandbytes' GPU kernel keeps the sign of values rounded to zero, and rounds ties to the smaller level."""
    for weight in (weight.cuda() for weight in weights[:-1]):
        ours = quantize(weight, "fp4")
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="fp4", compress_statistics=False)
        assert torch.equal(ours.absmax, state.absmax)
        scaled = scale_blocks(weight.flatten().float(), 64)[0].flatten()[: weight.numel()]
        levels = fp4_levels().cuda()
        own, theirs = (levels[unpack(codes).int()][: weight.numel()] for codes in (ours.packed, packed.flatten()))
        torch.testing.assert_close((own - scaled).abs(), (theirs - scaled).abs(), atol=1e-6, rtol=0)
        assert (own != theirs).float().mean() < 0.01


def test_without_the_grid_the_codes_are_those_of_the_other_kernels(monkeypatch):
    """All kernels of bitsandbytes except the CPU's take the nearest level, as its portable kernel does, which runs here."""
    portable = torch.ops.bitsandbytes.quantize_blockwise.default._op_dk
    absmax = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).abs()
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    expected, _ = portable(key, absmax - absmax.mean(), bnb.create_dynamic_map(), 256)
    assert not torch.equal(quantize_absmax(absmax).codes, expected)
    monkeypatch.setattr("finetuning_lessons.quantization.round_to_grid", lambda scaled: scaled)
    assert torch.equal(quantize_absmax(absmax).codes, expected)


@pytest.mark.parametrize("double_quant", [False, True])
def test_zeros_stay_zeros(double_quant):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[1], weight[2, :32] = 0, 0
    back = quantize(weight, double_quant=double_quant).dequantize()
    assert not back[1].any() and not back[2, :32].any() and back[2, 32:].any()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4"])
def test_no_weight_is_further_off_than_half_the_widest_gap(kind, weights):
    widest = {"nf4": 1 - 0.6961928, "fp4": 1 / 3, "int4": 1 / 7}[kind]
    for weight in weights:
        off = (quantize(weight, kind).dequantize() - weight).abs().flatten()
        scaled, _ = scale_blocks(off, 64)
        absmax = quantize(weight, kind).absmax
        assert ((scaled.abs() * scale_blocks(off, 64)[1][:, None]).amax(dim=1) <= (widest / 2 + 1e-6) * absmax).all()


def test_quantizing_again_changes_nothing(weights):
    once = quantize(weights[0]).dequantize()
    assert torch.equal(quantize(once).dequantize(), once)


def test_bits_a_weight_are_those_of_the_paper():
    weight = [torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))]
    assert bits_per_weight(weight, double_quant=False) == 4.5 == 8 * BYTES_4BIT
    mean = 32 / 1024**2  # the one number that is kept for a whole weight
    assert bits_per_weight(weight, double_quant=True) == pytest.approx(8 * BYTES_4BIT_DOUBLE + mean)
    assert round(bits_per_weight(weight, double_quant=True), 3) == 4.127


def test_stored_bytes_are_those_that_bitsandbytes_stores(weights):
    packed, state = bnb.quantize_4bit(weights[0], blocksize=64, quant_type="nf4", compress_statistics=True)
    stored = (packed, state.absmax, state.state2.absmax, state.offset)  # its two tables are the same for every weight
    assert quantize(weights[0], double_quant=True).nbytes == sum(tensor.nbytes for tensor in stored)


def test_nf4_errs_least_on_normal_numbers_and_less_than_often_quoted():
    normal = [torch.randn(512, 512, generator=torch.Generator().manual_seed(0))]
    nf4, fp4, int4 = (relative_error(normal, kind) for kind in ("nf4", "fp4", "int4"))
    assert nf4 < int4 < fp4
    assert int4 / nf4 == pytest.approx(1.17, abs=0.02)  # 1.8 is what one reads
    assert (fp4 / nf4) ** 2 == pytest.approx(1.8, abs=0.1)  # near it, as the lesson says
    back = bnb.dequantize_4bit(*bnb.quantize_4bit(normal[0], blocksize=64, quant_type="nf4"))
    assert nf4 == pytest.approx(((back - normal[0]).norm() / normal[0].norm()).item())


def test_ratio_of_means_by_hand():
    """The mean of 2 and 2 is 4/3 times that of 1 and 2; what is left of each block is 2/3 and -2/3."""
    ratio, error = ratio_of_means(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 2.0]))
    assert ratio == pytest.approx(4 / 3)
    assert error == pytest.approx((2 * (2 / 3) ** 2) ** 0.5 / 2**0.5 / 1.5)
    assert ratio_of_means(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 2.0])) == (2, 0)
