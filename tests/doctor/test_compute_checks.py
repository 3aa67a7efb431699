"""Computations: real on the CPU, then with one component perturbed."""

import pytest

from qlora_kit.doctor import command


@pytest.mark.parametrize("name", ["four_bit_product", "eight_bit_adam", "bfloat16", "attention"])
def test_computations_on_the_cpu_are_right(name):
    assert command.compute(name, "cpu").startswith("relative error")


@pytest.mark.parametrize("name", ["triton_kernel", "compiled_function", "captured_graph"])
def test_checks_of_the_gpu_are_skipped_without_one(name, skips):
    skips("needs a CUDA GPU", command.compute, name, "cpu")


@pytest.mark.parametrize("name", ["four_bit_product", "eight_bit_adam", "bfloat16", "attention", "captured_graph"])
def test_checks_are_skipped_where_the_gpu_that_was_requested_is_missing(name, machine, skips):
    machine(driver=None, built=None)
    skips("torch finds no GPU", command.compute, name, "cuda")


def test_a_wrong_4_bit_kernel_fails(monkeypatch, fails):
    import bitsandbytes

    right = bitsandbytes.matmul_4bit
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda x, w, quant_state: 1.02 * right(x, w, quant_state=quant_state))
    fails("2.0e-02", "'bitsandbytes>=", command.compute, "four_bit_product", "cpu")
    # A single token has its own kernel.
    monkeypatch.setattr(
        bitsandbytes, "matmul_4bit", lambda x, w, quant_state: right(x, w, quant_state=quant_state) * (1.02 if len(x) == 1 else 1)
    )
    fails("2.0e-02", "'bitsandbytes>=", command.compute, "four_bit_product", "cpu")


def test_a_product_of_nan_fails(monkeypatch, fails):
    import bitsandbytes

    right = bitsandbytes.matmul_4bit
    monkeypatch.setattr(
        bitsandbytes, "matmul_4bit", lambda x, w, quant_state: right(x, w, quant_state=quant_state) * float("nan")
    )
    fails("nan", "bitsandbytes", command.compute, "four_bit_product", "cpu")


def test_a_4_bit_table_that_is_not_nf4_fails(monkeypatch, fails):
    from bitsandbytes import functional

    right = functional.quantize_4bit
    monkeypatch.setattr(functional, "quantize_4bit", lambda *given, **named: right(*given, **named | {"quant_type": "fp4"}))
    fails("relative error", "bitsandbytes", command.compute, "four_bit_product", "cpu")


def test_a_wrong_or_wider_optimizer_state_fails(monkeypatch, fails):
    from bitsandbytes import optim

    right = optim.AdamW8bit
    with monkeypatch.context() as broken:
        broken.setattr(optim, "AdamW8bit", lambda *given, **named: right(*given, betas=(0.0, 0.999), **named))
        fails("update of four steps", "bitsandbytes", command.compute, "eight_bit_adam", "cpu")
    monkeypatch.setattr(optim, "AdamW8bit", optim.AdamW32bit)
    fails("stored in float32", "bitsandbytes", command.compute, "eight_bit_adam", "cpu")


def test_wrong_bfloat16_and_wrong_attention_fail(monkeypatch, fails):
    import torch.nn.functional as F

    linear, attend = F.linear, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "linear", lambda x, weight: 1.02 * linear(x, weight))
    fails("2.", "'torch>=", command.compute, "bfloat16", "cpu")
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, is_causal: attend(q, k, v))  # sees later tokens
    fails("relative error", "'torch>=", command.compute, "attention", "cpu")


def test_an_attention_whose_gradient_alone_is_wrong_fails(monkeypatch, fails):
    import torch.nn.functional as F

    attend = F.scaled_dot_product_attention

    def wrong_backward(q, k, v, is_causal):
        y = attend(q, k, v, is_causal=is_causal)
        return y.detach() + 0.98 * (y - y.detach())

    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong_backward)
    fails("2.0e-02", "'torch>=", command.compute, "attention", "cpu")


def test_the_4_bit_reference_is_close_to_the_weights():
    """The largest gap between levels is 0.3038, so an error is at most 0.152 of the block's largest weight."""
    import torch

    from qlora_kit.doctor import compute_checks

    _, _, reference = compute_checks.packed_weight("cpu", torch.float32)
    weight = compute_checks._random(compute_checks.OUT, compute_checks.IN)
    largest = weight.view(-1, 64).abs().amax(1, keepdim=True)
    off = ((reference - weight).view(-1, 64) / largest).abs()
    assert 0.1 < off.max() < 0.152 + 0.03  # 0.03 for the scales, which are quantized too
