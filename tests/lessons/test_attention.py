"""Attention with LoRA against torch's scaled dot-product attention, and against weights worked by hand."""

import math

import pytest
import torch
from torch import nn

from finetuning_lessons.attention import BUDGET, LoRAAttention, attention_weights, causal_mask
from finetuning_lessons.layers import LoRALayer, count_parameters


@pytest.fixture
def hidden() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 7, 24)


def reference(attention: LoRAAttention, hidden: torch.Tensor, **mask) -> torch.Tensor:
    """Compute torch's attention with the plain projections, without the updates of A and B."""

    def project(name, x):
        layer = attention.get_submodule(f"{name}_proj")
        return nn.functional.linear(x, (layer.linear if isinstance(layer, LoRALayer) else layer).weight)

    q, k, v = (project(name, hidden).view(2, 7, 4, 6).transpose(1, 2) for name in "qkv")
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, **mask)
    return project("o", mixed.transpose(1, 2).reshape(2, 7, 24))


PADDED = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
ADDED = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(1))
MASKS = {
    "none": None,
    "causal": torch.ones(7, 7, dtype=torch.bool).tril(),
    "causal and padding on the left": causal_mask(PADDED),
    "added numbers": ADDED,
    "added numbers and minus infinity": ADDED.masked_fill(~causal_mask(PADDED), -math.inf),
}


@pytest.mark.parametrize("name", MASKS)
def test_without_an_update_it_is_torchs_attention(hidden, name):
    attention = LoRAAttention(hidden_size=24, num_heads=4, lora_rank=2, target_modules=("q", "k", "v", "o"))
    ours, theirs = attention(hidden, MASKS[name]), reference(attention, hidden, attn_mask=MASKS[name])
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours, theirs)


def test_with_an_update_it_is_not_torchs_attention(hidden):
    for target in "qkvo":
        attention = LoRAAttention(hidden_size=24, num_heads=4, lora_rank=2, target_modules=(target,))
        nn.init.normal_(attention.get_submodule(f"{target}_proj").lora_B.weight)
        assert (attention(hidden) - reference(attention, hidden)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["causal", "causal and padding on the left", "added numbers and minus infinity"])
def test_the_gradient_of_the_input_is_torchs(hidden, name):
    """A row whose keys are all masked has no gradient, where a plain softmax gives NaN."""
    attention = LoRAAttention(hidden_size=24, num_heads=4, target_modules=("q", "k", "v", "o"))
    results = []
    for compute in (lambda x: attention(x, MASKS[name]), lambda x: reference(attention, x, attn_mask=MASKS[name])):
        x = hidden.clone().requires_grad_()
        compute(x).square().sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results)


def test_merged_projections_compute_the_same(hidden):
    attention = LoRAAttention(hidden_size=24, num_heads=4, lora_rank=2, target_modules=("q", "v"))
    layers = [module for module in attention.modules() if isinstance(module, LoRALayer)]
    for layer in layers:
        nn.init.normal_(layer.lora_B.weight)
    apart = attention(hidden, MASKS["causal"])
    for layer in layers:
        layer.merge_weights()
    torch.testing.assert_close(attention(hidden, MASKS["causal"]), apart)


def test_weights_worked_by_hand():
    """Scores are 0 and ln 3: a quarter and three quarters."""
    q = torch.tensor([[[[2.0]]]])
    k = torch.tensor([[[[0.0], [math.log(3) / 2]]]])
    assert attention_weights(q, k, None).flatten().tolist() == pytest.approx([0.25, 0.75])
    assert attention_weights(q, k, torch.tensor([True, False])).flatten().tolist() == [1, 0]
    assert attention_weights(q, k, torch.tensor([False, False])).flatten().tolist() == [0, 0]
    assert attention_weights(q, k, torch.tensor([math.log(3), 0.0])).flatten().tolist() == pytest.approx([0.5, 0.5])


def test_causal_mask_worked_by_hand():
    assert causal_mask(torch.tensor([[0, 1, 1]]))[0, 0].int().tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_a_later_token_changes_no_earlier_output(hidden):
    attention = LoRAAttention(hidden_size=24, num_heads=4)
    before = attention(hidden, MASKS["causal"])
    hidden[:, 4] += 1
    after = attention(hidden, MASKS["causal"])
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("targets", [("q",), ("q", "v"), ("q", "k", "v", "o"), ()])
def test_gradients_flow_to_the_updates_of_the_targets_only(hidden, targets):
    attention = LoRAAttention(hidden_size=24, num_heads=4, lora_rank=2, target_modules=targets)
    expected = {f"{target}_proj.lora_{letter}.weight" for target in targets for letter in "AB"}
    assert {name for name, parameter in attention.named_parameters() if parameter.requires_grad} == expected
    if targets:
        attention(hidden).square().sum().backward()
        assert {name for name, parameter in attention.named_parameters() if parameter.grad is not None} == expected


def test_parameters_worked_by_hand():
    """There are four projections of 768 x 768 by default, two of them with rank 8."""
    assert count_parameters(LoRAAttention()) == (2 * 8 * 2 * 768, 4 * 768 * 768 + 2 * 8 * 2 * 768)


def test_every_choice_of_the_lesson_spends_the_same_budget():
    """Parameters of each projection of the embedded model at rank 1: hidden size 192, two key heads of 32."""
    size = {"q": 192 + 192, "k": 192 + 64, "v": 192 + 64, "o": 192 + 192}
    assert {rank * sum(size[letter] for letter in targets) for targets, rank in BUDGET.items()} == {3840}


def test_wrong_sizes_and_targets_are_refused():
    with pytest.raises(ValueError, match="hidden_size 10: should be a multiple of num_heads 4"):
        LoRAAttention(hidden_size=10, num_heads=4)
    with pytest.raises(ValueError, match=r"target_modules \['w'\]"):
        LoRAAttention(target_modules=("q", "w"))
