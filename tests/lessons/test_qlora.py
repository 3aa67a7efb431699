"""Test QLoRA from scratch against peft on bitsandbytes' layers with the same weights."""

import bitsandbytes
import pytest
import torch
from peft import get_peft_model
from torch import nn

from finetuning_lessons.layers import ALL_SEVEN, LoRALayer, replace_linear_layers
from finetuning_lessons.lesson import load_model
from finetuning_lessons.qlora import (
    MIB,
    DequantizedProduct,
    NF4Linear,
    QLoRALayer,
    UnpackingLinear,
    saved_for_backward_mib,
    stored_mib,
)
from finetuning_lessons.quantization import quantize
from quantization_utils import create_bnb_config, create_lora_config, load_model_and_tokenizer


def random_layer(**settings) -> QLoRALayer:
    """Return a layer of 128 -> 64 features with a bias and an update that is not zero."""
    torch.manual_seed(0)
    layer = QLoRALayer(128, 64, rank=4, alpha=8.0, linear=nn.Linear(128, 64), **settings)
    nn.init.normal_(layer.lora_B.weight, std=0.1)
    return layer


@pytest.fixture(scope="module")
def pair(tiny_dir) -> tuple:
    """Return the embedded model with our layers and with peft's on bitsandbytes, with the same A and B, B not zero."""
    ours = load_model()
    torch.manual_seed(0)
    names = replace_linear_layers(ours, ALL_SEVEN, rank=4, alpha=8.0, layer_type=QLoRALayer)
    quantization = create_bnb_config(compute_dtype=torch.float32)
    theirs, _ = load_model_and_tokenizer(str(tiny_dir), quantization, device="cpu", dtype=torch.float32)
    theirs.requires_grad_(False)
    theirs = get_peft_model(theirs, create_lora_config(rank=4, alpha=8.0, dropout=0.0)).train()
    for name in names:
        layer, reference = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        nn.init.normal_(layer.lora_B.weight, std=0.02)
        reference.lora_A["default"].weight.data = layer.lora_A.weight.detach().clone()
        reference.lora_B["default"].weight.data = layer.lora_B.weight.detach().clone()
    return ours.train(), theirs, names


def test_the_frozen_weights_are_those_of_bitsandbytes(pair):
    ours, theirs, names = pair
    for name in names:
        reference = theirs.base_model.model.get_submodule(name).base_layer
        assert isinstance(reference, bitsandbytes.nn.Linear4bit)
        unpacked = bitsandbytes.functional.dequantize_4bit(reference.weight, reference.weight.quant_state)
        assert torch.equal(ours.get_submodule(name).weight, unpacked)


def test_the_model_is_that_of_peft_and_bitsandbytes_forward_and_backward(pair):
    ours, theirs, names = pair
    tokens = torch.randint(0, 6000, (2, 24), generator=torch.Generator().manual_seed(0))
    results = [model(input_ids=tokens, labels=tokens) for model in (ours, theirs)]
    torch.testing.assert_close(results[0].logits, results[1].logits, rtol=1e-4, atol=1e-4)
    for result in results:
        result.loss.backward()
    for name in names:
        layer, reference = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        torch.testing.assert_close(layer.lora_A.weight.grad, reference.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(layer.lora_B.weight.grad, reference.lora_B["default"].weight.grad, rtol=1e-3, atol=1e-6)
    trained = {name for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert trained == {f"{name}.lora_{letter}.weight" for name in names for letter in "AB"}


def test_the_layer_is_that_of_bitsandbytes_and_so_is_the_gradient_of_its_input():
    layer = random_layer()
    torch.manual_seed(0)
    linear = nn.Linear(128, 64)  # the same weights again
    reference = bitsandbytes.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4")
    reference.load_state_dict(linear.state_dict())
    reference.to("cpu")  # bitsandbytes packs when a layer is moved
    x = torch.randn(5, 128)
    results = []
    for module in (layer.linear, reference):
        moved = x.clone().requires_grad_()
        y = module(moved)
        y.square().sum().backward()
        results.append((y, moved.grad))
    torch.testing.assert_close(results[0], results[1])


def test_product_and_gradient_are_autograds_own():
    packed = quantize(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2, 3, 128, requires_grad=True)
    expected = x @ packed.dequantize().T
    actual = DequantizedProduct.apply(x, packed)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_it_is_a_lora_layer_on_the_unpacked_weight():
    layer = random_layer()
    plain = LoRALayer(128, 64, rank=4, alpha=8.0, linear=nn.Linear(128, 64))
    for ours, theirs in ((plain.linear.weight, layer.weight), (plain.linear.bias, layer.linear.bias)):
        ours.data = theirs.detach().clone()
    plain.lora_A, plain.lora_B = layer.lora_A, layer.lora_B
    x = torch.randn(5, 128)
    torch.testing.assert_close(layer(x), plain(x))
    assert layer.total_params == plain.total_params == 64 * 128 + 64 + 4 * (64 + 128)
    assert layer.trainable_params == 4 * (64 + 128)


def test_gradients_flow_to_a_and_b_only():
    layer = random_layer()
    layer(torch.randn(5, 128)).square().sum().backward()
    trained = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert trained == {"lora_A.weight", "lora_B.weight"}


def test_the_backward_pass_keeps_no_unpacked_weight():
    linear = nn.Linear(1024, 1024, bias=False)
    assert saved_for_backward_mib(NF4Linear(linear)) == 0
    assert saved_for_backward_mib(UnpackingLinear(linear)) == 4 * 1024 * 1024 / MIB


def test_a_16_bit_input_gets_a_16_bit_output():
    assert NF4Linear(nn.Linear(128, 64, bias=False))(torch.randn(2, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_merged_is_a_plain_layer_with_the_same_output():
    layer = random_layer()
    x = torch.randn(5, 128)
    merged = layer.merged_linear()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), layer(x))
    assert (NF4Linear(merged)(x) - layer(x)).abs().max() > 1e-2  # packed again, it is not


def test_merging_into_packed_weights_is_refused():
    with pytest.raises(NotImplementedError, match="merged_linear"):
        random_layer().merge_weights()


def test_stored_sizes_worked_by_hand():
    """Six layers of 393,216 weights in NF4 and 320 biases; embedding 6144 x 192 and 13 norms; rank 8 on all seven."""
    model = load_model()
    replace_linear_layers(model, ALL_SEVEN, layer_type=QLoRALayer)
    layer = 2 * 192 * 192 + 2 * 192 * 64 + 3 * 192 * 512
    pairs = 8 * (2 * (192 + 192) + 2 * (192 + 64) + 3 * (192 + 512))
    stored = stored_mib(model)
    assert stored["A and B"] == pytest.approx(4 * 6 * pairs / MIB)
    assert stored["embedding and norms"] == pytest.approx(2 * (6144 * 192 + 13 * 192) / MIB)
    assert stored["projections"] == pytest.approx(6 * (layer * 4.127 / 8 + 2 * 320) / MIB, rel=1e-3)
