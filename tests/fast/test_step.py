"""FastStep in training loops against the same loops with transformers, peft and autograd."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_kit.errors import UserError
from qlora_kit.fast import FastStep
from tests.fast.models import adapt, load_base, matrices

ROWS, LENGTH = 2, 24


@pytest.fixture
def make_model(two_layers_dir):
    return lambda **settings: adapt(load_base(two_layers_dir), std=0.0, **settings)


def batches(count, rows=ROWS):
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        ids = torch.randint(6000, (rows, LENGTH), generator=generator)
        labels = ids.clone()
        labels[0, :9] = -100
        yield ids, labels


def train_with_autograd(model, data, calls=1):
    """Return the losses, the gradients of the last optimizer step, and the trained matrices; `calls` batches a step."""
    optimizer, losses = torch.optim.AdamW(matrices(model).values(), lr=1e-3), []
    for number, (ids, labels) in enumerate(data, 1):
        loss = model(input_ids=ids, labels=labels).loss
        (loss / calls).backward()
        losses.append(loss.item())
        if number % calls == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in matrices(model).items()}
            optimizer.step()
            optimizer.zero_grad()
    return losses, gradients, {name: parameter.detach().clone() for name, parameter in matrices(model).items()}


def assert_equal(actual, expected):
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    for found, wanted in zip(actual[1:], expected[1:], strict=True):
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert (found[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


@pytest.mark.parametrize(
    "optimized, calls, set_to_none",
    [("flat tensor", 1, True), ("flat tensor", 2, True), ("flat tensor", 1, False), ("matrices, before", 2, True),
     ("matrices, afterwards", 1, False)],
    ids=str,
)  # fmt: skip
def test_a_loop_trains_as_with_autograd(make_model, optimized, calls, set_to_none):
    """Whichever tensors the optimizer was given, and however it clears gradients."""
    expected = train_with_autograd(make_model(), batches(6), calls)
    model = make_model()
    before = torch.optim.AdamW(matrices(model).values(), lr=1e-3)
    fast, losses = FastStep(model, ROWS, LENGTH), []
    given = fast.parameters if optimized == "flat tensor" else matrices(model).values()
    optimizer = before if optimized == "matrices, before" else torch.optim.AdamW(given, lr=1e-3)
    for number, (ids, labels) in enumerate(batches(6), 1):
        losses.append(fast.step(ids, labels, 1 / calls).item())
        if number % calls == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in matrices(model).items()}
            optimizer.step()
            optimizer.zero_grad(set_to_none)
    assert_equal((losses, gradients, matrices(model)), expected)


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_a_batch_of_any_size_is_averaged_over_all_its_tokens(make_model, rows):
    expected = train_with_autograd(make_model(), batches(1, rows=5))
    model = make_model()
    loss = FastStep(model, rows, LENGTH).step(*next(batches(1, rows=5)))
    gradients = {name: parameter.grad for name, parameter in matrices(model).items()}
    assert_equal(([loss.item()], gradients), expected[:2])


def test_a_batch_without_labels_changes_nothing(make_model):
    fast = FastStep(make_model(), ROWS, LENGTH)
    ids, labels = next(batches(1))
    assert fast.step(ids, torch.full_like(labels, -100)).item() == 0
    assert not fast.parameters[0].grad.any()


def test_dropout_is_the_models_and_follows_from_the_seed(make_model):
    def losses(dropout, seed):
        fast = FastStep(make_model(dropout=dropout), ROWS, LENGTH, seed=seed)
        ids, labels = next(batches(1))
        with torch.no_grad():
            fast.parameters[0].normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        results = [fast.step(ids, labels).item(), fast.step(ids, labels).item()]
        fast.parameters[0].grad = None
        return [*results, fast.step(ids, labels).item()]

    assert len(set(losses(0.0, seed=1))) == 1
    assert losses(0.5, seed=1) == losses(0.5, seed=1)
    assert len({*losses(0.5, seed=1), *losses(0.5, seed=2)}) == 6


def test_gradient_checkpointing_is_the_models(make_model):
    assert FastStep(make_model(), ROWS, LENGTH).micro.decoder.recomputed == 0
    assert FastStep(make_model(checkpointing=True), ROWS, LENGTH).micro.decoder.recomputed == 2


def test_the_model_evaluates_and_saves_what_was_trained(make_model, two_layers_dir, tmp_path):
    model = make_model()
    fast = FastStep(model, ROWS, LENGTH)
    optimizer = torch.optim.AdamW(fast.parameters, lr=1e-3)
    ids, labels = next(batches(1))
    before = model(input_ids=ids, labels=labels).loss.item()
    for _ in range(10):
        fast.step(ids, labels)
        optimizer.step()
        optimizer.zero_grad()
    after = model(input_ids=ids, labels=labels).loss.item()
    assert after < before - 0.1 and after == pytest.approx(fast.step(ids, labels).item(), rel=1e-5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_base(two_layers_dir), tmp_path)
    assert again.eval()(input_ids=ids, labels=labels).loss.item() == pytest.approx(after, rel=1e-6)


def test_a_model_that_is_not_covered_is_refused_with_the_reason(make_model, two_layers_dir, other_models):
    def refused(model):
        with pytest.raises(UserError, match=r"model: has no fast training pass \((.*)\)\. Train it with autograd\.") as error:
            FastStep(model, ROWS, LENGTH)
        return str(error.value)

    gpt2 = get_peft_model(AutoModelForCausalLM.from_pretrained(other_models["gpt2"]), LoraConfig(task_type="CAUSAL_LM"))
    assert "gpt2 is not built like Llama" in refused(gpt2)
    assert "not the LoRA matrices" in refused(make_model().requires_grad_(False))
    uneven = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 8}, task_type="CAUSAL_LM")
    assert "differ in rank" in refused(get_peft_model(load_base(two_layers_dir), uneven))


@pytest.mark.parametrize("key", ["compiled", "captured"])
def test_what_cannot_work_here_is_refused_where_it_is_required(make_model, key):
    with pytest.raises(UserError, match=rf"{key}: true: cannot work here \(needs a CUDA GPU\)"):
        FastStep(make_model(), ROWS, LENGTH, **{key: True})


def test_a_wrong_shape_is_refused(make_model):
    fast = FastStep(make_model(), ROWS, LENGTH)
    ids, labels = next(batches(1))
    for wrong in ((ids[:, :-1], labels[:, :-1]), (ids, labels[:1]), (ids[0], labels[0])):
        with pytest.raises(ValueError, match=r"should be \(rows, 24\)"):
            fast.step(*wrong)


def test_a_second_fast_step_for_the_same_model_ends_the_first(make_model):
    model = make_model()
    first, second = FastStep(model, ROWS, LENGTH), FastStep(model, ROWS, LENGTH)
    second.step(*next(batches(1)))
    with pytest.raises(RuntimeError, match="make a new FastStep"):
        first.step(*next(batches(1)))
