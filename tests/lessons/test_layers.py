"""Test the LoRA layer against peft's and against numbers worked by hand."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from finetuning_lessons.layers import ALL_SEVEN, LoRALayer, count_parameters, replace_linear_layers
from finetuning_lessons.lesson import load_model


@pytest.fixture
def by_hand() -> LoRALayer:
    """W = [[1, 2], [3, 4]], A = [[1, -1]], B = [[2], [5]], alpha/rank = 3: ΔW = [[6, -6], [15, -15]]."""
    layer = LoRALayer(2, 2, rank=1, alpha=3.0)
    for linear, values in ((layer.linear, [[1, 2], [3, 4]]), (layer.lora_A, [[1, -1]]), (layer.lora_B, [[2], [5]])):
        linear.weight.data = torch.tensor(values, dtype=torch.float32)
    return layer


@pytest.fixture
def layer() -> LoRALayer:
    """Return a layer whose B is not zero, as after training."""
    torch.manual_seed(0)
    layer = LoRALayer(48, 32, rank=4, alpha=8.0)
    nn.init.normal_(layer.lora_B.weight)
    return layer


def test_output_worked_by_hand(by_hand):
    assert by_hand(torch.tensor([1.0, 2.0])).tolist() == [5 - 6, 11 - 15]  # W x = [5, 11]; A x = -1
    assert by_hand.update().tolist() == [[6, -6], [15, -15]]


def test_merged_weights_worked_by_hand(by_hand):
    by_hand.merge_weights()
    assert by_hand.linear.weight.tolist() == [[7, -4], [18, -11]]
    by_hand.unmerge_weights()
    assert by_hand.linear.weight.tolist() == [[1, 2], [3, 4]]


def test_parameters_worked_by_hand():
    """The example of the course: 4096 x 4096 with rank 8 trains 64 Ki of 16 Mi parameters, 0.39 %."""
    with torch.device("meta"):
        layer = LoRALayer(4096, 4096, rank=8)
    assert layer.trainable_params == 8 * (4096 + 4096) == 65_536
    assert layer.total_params == 4096 * 4096 + 65_536


def test_a_new_layer_computes_what_the_linear_layer_computes():
    torch.manual_seed(0)
    linear = nn.Linear(6, 5)
    x, expected = torch.randn(3, 6), None
    expected = linear(x)
    layer = LoRALayer(6, 5, rank=2, linear=linear)
    assert torch.equal(layer(x), expected)
    assert layer.lora_A.weight.abs().min() > 0 and not layer.lora_B.weight.any()


def test_gradients_flow_to_a_and_b_only(layer):
    layer(torch.randn(3, 48)).square().sum().backward()
    assert {name for name, parameter in layer.named_parameters() if parameter.grad is not None} == {
        "lora_A.weight",
        "lora_B.weight",
    }


def test_at_the_start_b_has_a_gradient_and_a_has_none():
    layer = LoRALayer(8, 8, rank=2)
    layer(torch.randn(3, 8)).square().sum().backward()
    assert layer.lora_B.weight.grad.any() and not layer.lora_A.weight.grad.any()


def test_merged_equals_unmerged(layer):
    x = torch.randn(7, 48)
    apart = layer(x)
    layer.merge_weights()
    assert layer.merged and not torch.equal(layer.linear.weight, layer.original_weight)
    torch.testing.assert_close(layer(x), apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerging_restores_every_bit_and_both_can_be_repeated(layer, dtype):
    layer = layer.to(dtype)
    before = layer.linear.weight.clone()
    layer.merge_weights()
    once = layer.linear.weight.clone()
    layer.merge_weights()
    assert torch.equal(layer.linear.weight, once)
    layer.unmerge_weights()
    assert torch.equal(layer.linear.weight, before) and not layer.merged
    layer.unmerge_weights()
    assert torch.equal(layer.linear.weight, before)
    assert not torch.equal(once - layer.update(), before)  # subtracting would not have restored them


def test_a_merged_layer_moves_with_its_copy_and_keeps_it_out_of_checkpoints(layer):
    names = set(layer.state_dict())
    layer.merge_weights()
    assert set(layer.state_dict()) == names
    assert layer.to(torch.float64).original_weight.dtype == torch.float64


def test_dropout_acts_on_the_update_only_and_in_training_only():
    torch.manual_seed(0)
    layer = LoRALayer(64, 4, rank=2, dropout=0.5)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), layer.linear(x))  # B is zero, so that W alone is seen
    nn.init.ones_(layer.lora_B.weight)
    assert not torch.allclose(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def peft_pair(targets: list[str], **settings):
    """Return our model and peft's with the same A and B, B not zero."""
    torch.manual_seed(0)
    ours, theirs = load_model(), load_model()
    names = replace_linear_layers(ours, targets, rank=4, alpha=12.0, **settings)
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=12, target_modules=targets, lora_dropout=0.0))
    for name in names:
        layer, reference = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        nn.init.normal_(layer.lora_B.weight, std=0.02)
        reference.lora_A["default"].weight.data = layer.lora_A.weight.detach().clone()
        reference.lora_B["default"].weight.data = layer.lora_B.weight.detach().clone()
    return ours, theirs, names


def test_the_model_equals_pefts_forward_and_backward():
    ours, theirs, names = peft_pair(list(ALL_SEVEN))
    assert len(names) == 42
    assert count_parameters(ours) == theirs.get_nb_trainable_parameters()
    tokens = torch.randint(0, 6000, (2, 24))
    results = [model(input_ids=tokens, labels=tokens) for model in (ours, theirs)]
    torch.testing.assert_close(results[0].logits, results[1].logits, rtol=1e-4, atol=1e-4)
    for result in results:
        result.loss.backward()
    for name in names:
        layer, reference = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        torch.testing.assert_close(layer.lora_A.weight.grad, reference.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(layer.lora_B.weight.grad, reference.lora_B["default"].weight.grad, rtol=1e-3, atol=1e-6)


def test_merged_weights_equal_pefts():
    ours, theirs, names = peft_pair(["q_proj", "v_proj"])
    theirs = theirs.merge_and_unload()
    for name in names:
        layer = ours.get_submodule(name)
        layer.merge_weights()
        torch.testing.assert_close(layer.linear.weight, theirs.get_submodule(name).weight)


def test_a_fresh_model_is_the_base_model_and_everything_else_is_frozen():
    model, tokens = load_model().eval(), torch.arange(20)[None]
    before = model(tokens).logits
    replace_linear_layers(model, ["v_proj"])
    assert torch.equal(model(tokens).logits, before)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 12 and all(".v_proj.lora_" in name for name in trainable)


def test_a_second_call_keeps_the_first_calls_layers_trainable():
    model = load_model()
    replace_linear_layers(model, ["q_proj"], rank=2)
    replace_linear_layers(model, ["down_proj"], rank=3)
    assert count_parameters(model)[0] == 6 * (2 * (192 + 192) + 3 * (512 + 192))


def test_gpt2s_transposed_layers_are_replaced_too(other_models):
    model = AutoModelForCausalLM.from_pretrained(other_models["gpt2"]).eval()
    tokens = torch.arange(20)[None]
    before = model(tokens).logits
    names = replace_linear_layers(model, ["c_attn"], rank=2)
    layer = model.get_submodule(names[0])
    assert tuple(layer.update().shape) == (192, 64) == tuple(layer.linear.weight.shape)
    torch.testing.assert_close(model(tokens).logits, before)
    layer.merge_weights()
    layer.unmerge_weights()
    assert torch.isfinite(model(tokens).logits).all()


def test_unknown_targets_and_rank_0_are_refused():
    with pytest.raises(ValueError, match=r"targets \['q_porj'\]"):
        replace_linear_layers(load_model(), ["q_porj", "v_proj"])
    with pytest.raises(ValueError, match="rank 0"):
        LoRALayer(4, 4, rank=0)
