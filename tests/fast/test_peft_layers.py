"""The fused projection against autograd's derivative and against peft's layers."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.bnb import Linear4bit

from qlora_kit.fast.nf4 import unpack_stacked
from qlora_kit.fast.peft_layers import FusedLinear4bit, fuse
from qlora_kit.fast.projection import Lora, LoraProjection, draw_keep_mask, draw_keys, project, reduce_to_rank
from tests.fast.models import adapt, load_base, matrices


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    x, A, B = random(6, 5).requires_grad_(), random(2, 5).requires_grad_(), random(4, 2).requires_grad_()
    return x, random(4, 5), random(4), A, B


def unfused(x, weight, bias, A, B, scale, mask, keep):
    return x @ weight.T + bias + scale * ((x * mask / keep) @ A.T) @ B.T


@pytest.mark.parametrize("keep", [1.0, 0.75])
def test_gradcheck_in_fp64_and_equal_to_the_unfused_formula_under_the_same_mask(keep):
    x, weight, bias, A, B = problem()
    key = torch.tensor(12345, dtype=torch.int32)
    mask = draw_keep_mask(x.shape, key, keep).double()
    assert (mask.mean() < 1) == (keep < 1)

    def fused(x, A, B):
        return LoraProjection.apply(x, weight, bias, A, B, 1.5, keep, key)

    torch.testing.assert_close(fused(x, A, B), unfused(x, weight, bias, A, B, 1.5, mask, keep))
    assert torch.autograd.gradcheck(fused, (x, A, B))
    actual = torch.autograd.grad(fused(x, A, B).square().sum(), (x, A, B))
    expected = torch.autograd.grad(unfused(x, weight, bias, A, B, 1.5, mask, keep).square().sum(), (x, A, B))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("adapted_members", [(True, True, True), (True, False, True), (False, True, False)])
def test_projections_that_share_an_input_are_one_product(adapted_members):
    """q, k and v of 6, 2 and 3 columns: stacked or one after the other, with or without LoRA on each."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    sizes, key = (6, 2, 3), torch.tensor(99, dtype=torch.int32)
    weights = tuple(torch.randn(size, 5, generator=generator, dtype=torch.float64) for size in sizes)
    As = [torch.randn(2, 5, generator=generator, dtype=torch.float64) for has in adapted_members if has]
    Bs = tuple(
        torch.randn(size, 2, generator=generator, dtype=torch.float64) if has else None
        for size, has in zip(sizes, adapted_members, strict=True)
    )
    lora = Lora(torch.cat(As), Bs, sizes, 0.5, 0.8)
    stacked = unpack_stacked(weights, Bs, lora.rank, torch.float64)
    assert stacked.shape == (11, 5 + 8)  # 2, 4 or 6 columns of B, rounded up to 8
    y = project(x, reduce_to_rank(x, lora, key), stacked, None)
    mask, waiting, expected = draw_keep_mask(x.shape, key, 0.8).double(), list(As), []
    for weight, B in zip(weights, Bs, strict=True):
        update = 0.0 if B is None else 0.5 * ((x * mask / 0.8) @ waiting.pop(0).T) @ B.T
        expected.append(x @ weight.T + update)
    torch.testing.assert_close(y, torch.cat(expected, 1))


@pytest.mark.parametrize("keep", [0.95, 0.5])
def test_the_mask_keeps_its_share_in_every_row_and_column_and_for_every_key(keep):
    masks = torch.stack([draw_keep_mask(torch.Size((600, 500)), key, keep).double() for key in draw_keys((3,), 4)])
    count = 600 * 500
    spread = (keep * (1 - keep)) ** 0.5
    assert (masks.mean((1, 2)) - keep).abs().max() < 4 * spread / count**0.5
    for dimension, length in ((1, 600), (2, 500)):  # the standard deviation of independent draws
        assert masks.mean(dimension).std() == pytest.approx(spread / length**0.5, rel=0.1)


def test_neighbouring_elements_are_independent():
    mask = draw_keep_mask(torch.Size((1000, 300)), draw_keys((4,), 1)[0], 0.5).double().flatten() * 2 - 1
    for other in (mask[1:], mask[2:], mask[300:]):
        assert abs((mask[: len(other)] * other).mean()) < 4 / len(other) ** 0.5


@pytest.mark.parametrize("keep", [0.95, 0.5])
def test_masks_of_different_keys_are_independent(keep):
    """The correlations between 40 keys, some of which differ in one bit, are those of independent draws."""
    keys = torch.cat([draw_keys((5,), 32), draw_keys((5,), 1) ^ (1 << torch.arange(8, dtype=torch.int32))])
    masks = torch.stack([draw_keep_mask(torch.Size((40_000,)), key, keep).double() for key in keys])
    pairs = torch.corrcoef(masks)[torch.triu_indices(40, 40, 1).unbind()] * 200  # times the root of the count: standard normal
    assert pairs.std() < 1.1 and pairs.abs().max() < 4.5


def test_keys_depend_on_the_seed_alone():
    assert torch.equal(draw_keys((1, 2, 3), 5), draw_keys((1, 2, 3), 5))
    assert not torch.equal(draw_keys((1, 2, 3), 5), draw_keys((1, 2, 4), 5))


def loss_and_gradients(model):
    ids = torch.randint(6000, (2, 24), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: matrix.grad for name, matrix in matrices(model).items()}


def test_a_quantized_model_trains_as_with_pefts_layers(tiny_dir):
    expected_loss, expected = loss_and_gradients(adapt(load_base(tiny_dir)))
    model = adapt(load_base(tiny_dir))
    assert fuse(model) == 6 * 7
    loss, actual = loss_and_gradients(model)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_draws_the_same_dropout_again(tiny_dir):
    plain, recomputed = adapt(load_base(tiny_dir), 0.3), adapt(load_base(tiny_dir), 0.3, checkpointing=True)
    fuse(plain), fuse(recomputed)
    loss, gradients = loss_and_gradients(plain)
    again, other = loss_and_gradients(recomputed)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-7)


def test_dropout_keeps_the_mean_and_is_off_outside_training(tiny_dir):
    model = adapt(load_base(tiny_dir), dropout=0.5)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(1, 7, 512, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = layer.eval()(x)
        fuse(model)
        torch.testing.assert_close(layer(x), expected)
        layer.train()
        torch.manual_seed(5)
        draws = torch.stack([layer(x) for _ in range(400)])
    assert draws.std(0).mean() > 0.001
    base = layer.base_layer(x)
    torch.testing.assert_close(draws.mean(0) - base, expected - base, atol=4 * draws.std(0).max().item() / 20, rtol=0)


def test_the_saved_adapter_is_a_standard_one(tiny_dir, tmp_path):
    model = adapt(load_base(tiny_dir))
    fuse(model)
    model.save_pretrained(tmp_path)
    base = load_base(tiny_dir)
    plain = PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert {type(module) for module in plain.modules()} >= {Linear4bit}


def test_layers_that_are_not_covered_stay_pefts(tiny_dir):
    base = load_base(tiny_dir)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"))
    assert fuse(model) == 0
    assert not any(isinstance(module, FusedLinear4bit) for module in model.modules())
