"""FastDecoder against transformers, peft and autograd, on real 4-bit models."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from qlora_kit.fast.micro_step import MicroStep, StepSettings
from qlora_kit.fast.projection import draw_keys
from qlora_kit.fast.training_pass import FastDecoder, why_not_fast
from tests.fast.models import SEVEN, adapt, load_base, matrices


def batch(rows=2, length=24):
    ids = torch.randint(6000, (rows, length), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :9] = -100
    return ids, labels


def compute_with_autograd(model, ids, labels):
    """Loss and gradients by transformers, peft and autograd."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    return loss.item(), {name: matrix.grad.clone() for name, matrix in matrices(model).items()}


def compute_fast(model, ids, labels, recomputed=0, key=0):
    decoder = FastDecoder(model, recomputed, compiled=False)
    decoder.adapters.clear_gradients()
    loss_scale = 1.0 / (labels[:, 1:] != -100).sum()
    keys = draw_keys((key,), 4 * len(decoder.layers)).view(-1, 4)
    loss = decoder.accumulate(ids, labels, loss_scale, keys).item()
    return loss, {name: decoder.adapters.gradient_of(matrix).clone() for name, matrix in matrices(model).items()}


def assert_same(actual, expected, tolerance=1e-4):
    assert actual[0] == pytest.approx(expected[0], rel=tolerance)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.abs().max() > 0
        assert (actual[1][name] - gradient).norm() < tolerance * gradient.norm(), name
        norm = pytest.approx(gradient.norm().item(), rel=max(tolerance / 4, 1e-4))  # fails if a factor such as `scale` is wrong
        assert actual[1][name].norm().item() == norm, name


@pytest.fixture(scope="module")
def other_folders(tmp_path_factory, two_layers_dir):
    """Folders of small random models of the other Llama-like architectures, each with what Qwen2 does not have."""
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    common = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 6144}
    configs = {
        "llama": LlamaConfig(**common, num_key_value_heads=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
        "llama3-rope": LlamaConfig(
            **common, num_key_value_heads=1,
            rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
        ),
        "mistral": MistralConfig(**common, num_key_value_heads=2, sliding_window=64),
        "qwen3": Qwen3Config(**common, num_key_value_heads=2, head_dim=32),
    }  # fmt: skip
    folders = {}
    for name, config in configs.items():
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # norms and biases too, which start at one and zero
            parameter.data += 0.02 * torch.randn_like(parameter)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        AutoTokenizer.from_pretrained(two_layers_dir).save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("name", ["llama", "llama3-rope", "mistral", "qwen3"])
def test_other_llama_like_models_train_as_with_the_library(other_folders, name):
    model = adapt(load_base(other_folders[name]))
    assert why_not_fast(model, 24) is None
    expected = compute_with_autograd(model, *batch())
    assert_same(compute_fast(model, *batch(), recomputed=1), expected)


@pytest.mark.parametrize("four_bits", [True, False])
@pytest.mark.parametrize("targets", [SEVEN, ["q_proj", "v_proj"], ["k_proj", "up_proj", "down_proj"], ["o_proj"]], ids=str)
def test_any_choice_of_projections_trains_as_with_the_library(two_layers_dir, four_bits, targets):
    model = adapt(load_base(two_layers_dir, four_bits=four_bits), targets=targets)
    expected = compute_with_autograd(model, *batch())
    assert_same(compute_fast(model, *batch()), expected)


def test_bf16_trains_as_with_the_library_up_to_rounding(two_layers_dir):
    model = adapt(load_base(two_layers_dir, torch.bfloat16))
    assert_same(
        compute_fast(model, *batch(4, 64)), compute_with_autograd(model, *batch(4, 64)), tolerance=0.08
    )  # layers of 8-bit rounding


@pytest.mark.parametrize("recomputed", [1, 3, 6])
def test_recomputing_layers_changes_nothing_with_dropout(tiny_dir, recomputed):
    model = adapt(load_base(tiny_dir), dropout=0.3)
    expected = compute_fast(model, *batch())
    loss, gradients = compute_fast(model, *batch(), recomputed)
    assert loss == expected[0] and all(torch.equal(gradients[name], expected[1][name]) for name in gradients)
    assert compute_fast(model, *batch(), key=1)[0] != loss


def test_dropout_has_the_gradient_of_its_own_loss(tiny_dir):
    """The difference quotient of the loss along a random direction, under fixed masks, is the gradient times the direction."""
    model = adapt(load_base(tiny_dir), dropout=0.3)
    decoder = FastDecoder(model, 3, compiled=False)
    keys = draw_keys((5,), 4 * 6).view(-1, 4)

    def loss():
        decoder.adapters.clear_gradients()
        return decoder.accumulate(*batch(), torch.tensor(1.0), keys).item()

    loss()
    gradient, flat = decoder.adapters.gradient.clone(), decoder.adapters.flat.data
    direction = (
        gradient / gradient.norm() + 0.1 * torch.randn(len(flat), generator=torch.Generator().manual_seed(3)) / len(flat) ** 0.5
    )
    step = 1e-2
    flat += step * direction
    higher = loss()
    flat -= 2 * step * direction
    assert (higher - loss()) / (2 * step) == pytest.approx((gradient @ direction).item(), rel=0.01)


def test_losses_are_the_librarys_without_dropout(two_layers_dir):
    model = adapt(load_base(two_layers_dir), dropout=0.5)
    ids, labels = batch()
    losses = FastDecoder(model, 0, compiled=False).losses(ids, labels)
    assert losses.shape == ids.shape and losses[:, -1].abs().max() == 0 and losses[0, :8].abs().max() == 0
    expected = model.eval()(input_ids=ids, labels=labels).loss.item()
    assert (losses.sum() / (labels[:, 1:] != -100).sum()).item() == pytest.approx(expected, rel=1e-5)


def test_peft_saves_and_loads_the_flat_adapters_base(two_layers_dir, tmp_path):
    model = adapt(load_base(two_layers_dir))
    decoder = FastDecoder(model, 0, compiled=False)
    decoder.adapters.flat.data.mul_(1.5)  # as an optimizer does, without peft's parameters
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_base(two_layers_dir), tmp_path)
    ids, _ = batch()
    torch.testing.assert_close(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    decoder.adapters.flat.data.zero_()
    model.load_adapter(str(tmp_path), "default", is_trainable=True)  # as the Trainer does on resuming
    assert decoder.adapters.flat.data.abs().max() > 0


def test_a_smaller_batch_has_the_loss_and_gradients_of_its_own_rows(two_layers_dir):
    """It is filled up with rows without labels, which must not count."""
    model = adapt(load_base(two_layers_dir))
    expected = compute_with_autograd(model, *batch(2))
    micro = MicroStep(FastDecoder(model, 0, compiled=False), StepSettings(5, 24, seed=1, captured=False))
    micro.begin_step(0)
    micro.train(*batch(5), torch.tensor(1.0))  # leaves rows in the buffers
    micro.begin_step(1)
    loss = micro.train(*batch(2), 1.0 / (batch(2)[1][:, 1:] != -100).sum()).item()
    gradients = {name: micro.decoder.adapters.gradient_of(matrix) for name, matrix in matrices(model).items()}
    assert_same((loss, gradients), expected)
    assert micro.losses(*batch(2)).shape == (2, 23)


def test_dropout_depends_on_seed_step_and_micro_step_alone(two_layers_dir):
    model = adapt(load_base(two_layers_dir), dropout=0.5)
    decoder = FastDecoder(model, 0, compiled=False)

    def losses(seed, step):
        micro = MicroStep(decoder, StepSettings(2, 24, seed, captured=False))
        micro.begin_step(step)
        return [micro.train(*batch(), torch.tensor(0.01)).item() for _ in range(2)]

    assert losses(1, 4) == losses(1, 4)
    assert len({*losses(1, 4), *losses(1, 5), *losses(2, 4)}) == 6


@pytest.mark.parametrize(
    "dtype, tolerance, steps",
    [
        pytest.param(torch.float32, 1e-4, 32, id="fp32"),
        pytest.param(torch.float32, 1e-4, 120, id="fp32, longer", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 0.02, 120, id="bf16", marks=pytest.mark.slow),
    ],
)
def test_learning_is_unchanged(two_layers_dir, root, dtype, tolerance, steps):
    """The loss curve is that of transformers, peft and autograd, from the same start on the same data."""
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(two_layers_dir)((root / "samples/articles.txt").read_text())["input_ids"]
    quarter = steps // 4
    blocks = torch.tensor(text[: quarter * 32]).view(quarter, 1, 32).repeat(4, 1, 1)
    curves = []
    for fast in (False, True):
        model = adapt(load_base(two_layers_dir, dtype))
        decoder = FastDecoder(model, 0, compiled=False) if fast else None
        trained = [decoder.adapters.flat] if decoder else matrices(model).values()
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        curve = []
        for ids in blocks:
            if decoder:
                decoder.adapters.clear_gradients()
                loss = decoder.accumulate(ids, ids, torch.tensor(1 / 31), torch.zeros(2, 4, dtype=torch.int32))
            else:
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-quarter:].mean() < curves[0][:quarter].mean() - 0.5  # something was learned
    assert (curves[0] - curves[1]).abs().mean() < tolerance
    assert abs(curves[0][-quarter:].mean() - curves[1][-quarter:].mean()) < tolerance


def test_a_model_that_is_not_covered_has_a_reason(two_layers_dir, other_folders, other_models):
    gpt2 = get_peft_model(AutoModelForCausalLM.from_pretrained(other_models["gpt2"]), LoraConfig(task_type="CAUSAL_LM"))
    assert "gpt2" in why_not_fast(gpt2, 24)
    assert "64 tokens back" in why_not_fast(adapt(load_base(other_folders["mistral"])), 65)
    frozen = load_base(two_layers_dir).requires_grad_(False)
    dora = get_peft_model(frozen, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"))
    assert "variant" in why_not_fast(dora, 24)
    trains_a_norm = adapt(load_base(two_layers_dir))
    trains_a_norm.base_model.model.model.norm.weight.requires_grad_(True)
    assert "trained parameters" in why_not_fast(trains_a_norm, 24)
