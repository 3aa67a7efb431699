"""The fused projection against autograd's own derivative and against peft's layer."""

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit

from qlora_kit.fast.lora import FusedLinear4bit, LoraProjection, fuse
from quantization_utils import create_bnb_config, create_lora_config, load_model_and_tokenizer, prepare_model_for_training


def problem(masked: bool):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, A, B = random(6, 5).requires_grad_(), random(2, 5).requires_grad_(), random(4, 2).requires_grad_()
    mask = (random(6, 5) > -0.5) if masked else None
    return x, random(4, 5), random(4), A, B, mask


def unfused(x, weight, bias, A, B, scale, mask, keep):
    dropped = x if mask is None else x * mask / keep
    return x @ weight.T + bias + scale * (dropped @ A.T) @ B.T


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_in_fp64_and_equal_to_the_unfused_formula(masked):
    x, weight, bias, A, B, mask = problem(masked)
    keep = 0.75 if masked else 1.0

    def fused(x, A, B):
        return LoraProjection.apply(x, weight, bias, A, B, 1.5, mask, keep)

    torch.testing.assert_close(fused(x, A, B), unfused(x, weight, bias, A, B, 1.5, mask, keep))
    assert torch.autograd.gradcheck(fused, (x, A, B))
    actual = torch.autograd.grad(fused(x, A, B).square().sum(), (x, A, B))
    expected = torch.autograd.grad(unfused(x, weight, bias, A, B, 1.5, mask, keep).square().sum(), (x, A, B))
    torch.testing.assert_close(actual, expected)


def adapted(tiny_dir, dropout, checkpointing=False, dtype=torch.float32):
    model, _ = load_model_and_tokenizer(str(tiny_dir), create_bnb_config(compute_dtype=dtype), device="cpu", dtype=dtype)
    torch.manual_seed(0)  # of A
    model = prepare_model_for_training(model, create_lora_config(dropout=dropout), use_gradient_checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return model.train()


def loss_and_gradients(model):
    ids = torch.randint(6000, (2, 24), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_quantized_model_trains_as_with_pefts_layers(tiny_dir):
    expected_loss, expected = loss_and_gradients(adapted(tiny_dir, dropout=0.0))
    model = adapted(tiny_dir, dropout=0.0)
    assert fuse(model) == 6 * 7
    loss, actual = loss_and_gradients(model)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-6)


def test_recomputation_draws_the_same_dropout_again(tiny_dir):
    plain, recomputed = adapted(tiny_dir, 0.3), adapted(tiny_dir, 0.3, checkpointing=True)
    fuse(plain), fuse(recomputed)
    loss, gradients = loss_and_gradients(plain)
    again, other = loss_and_gradients(recomputed)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-7)


def test_dropout_keeps_the_mean_and_is_off_outside_training(tiny_dir):
    model = adapted(tiny_dir, dropout=0.5)
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
    model = adapted(tiny_dir, dropout=0.0)
    fuse(model)
    model.save_pretrained(tmp_path)
    base, _ = load_model_and_tokenizer(
        str(tiny_dir), create_bnb_config(compute_dtype=torch.float32), device="cpu", dtype=torch.float32
    )
    plain = PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert {type(module) for module in plain.modules()} >= {Linear4bit}


def test_layers_that_the_function_does_not_cover_stay_pefts(tiny_dir):
    from peft import LoraConfig, get_peft_model

    base, _ = load_model_and_tokenizer(
        str(tiny_dir), create_bnb_config(compute_dtype=torch.float32), device="cpu", dtype=torch.float32
    )
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"))
    assert fuse(model) == 0
    assert not any(isinstance(module, FusedLinear4bit) for module in model.modules())
