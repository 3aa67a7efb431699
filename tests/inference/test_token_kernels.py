"""The product of a few tokens with 4-bit weights against the product with the unpacked weights."""

import bitsandbytes
import pytest
import torch

from qlora_kit.fast.llama_parts import ProjectionGroup
from qlora_kit.fast.projection import Lora
from qlora_kit.inference.token_kernels import project


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sizes, fan_in, rank", [((48, 16, 16), 192, 4), ((5504, 5504), 2048, 16), ((2048,), 11008, 0)], ids=str)
def test_the_product_is_that_of_the_unpacked_weights(rows, sizes, fan_in, rank):
    torch.manual_seed(0)
    weights = []
    for size in sizes:
        weight = torch.randn(size, fan_in, device="cuda", dtype=torch.bfloat16) / 20
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        packed.quant_state = state
        weights.append(packed)
    lora = None
    if rank:
        A = (torch.randn(rank * len(sizes), fan_in, device="cuda") / 20).bfloat16()
        lora = Lora(A, tuple(torch.randn(size, rank, device="cuda").bfloat16() for size in sizes), sizes, scale=1.0, keep=1.0)
    bias = torch.randn(sum(sizes), device="cuda").bfloat16()
    x = torch.randn(rows, fan_in, device="cuda").bfloat16()
    actual = project(x, ProjectionGroup(tuple(weights), bias, sizes, lora, None))
    unpacked = torch.cat([bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state) for weight in weights]).double()
    expected = x.double() @ unpacked.T + bias.double()
    if lora:
        xa = (x @ lora.A.T).double().split(rank, 1)
        expected += torch.cat([part @ b.double().T for part, b in zip(xa, lora.B, strict=True)], 1)
    torch.testing.assert_close(actual.double(), expected, rtol=4e-3, atol=4e-3 * expected.abs().max().item())
