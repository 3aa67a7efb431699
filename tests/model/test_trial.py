"""Try the layers of a model before training."""

import pytest
import torch
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

from qlora_kit.errors import UserError
from qlora_kit.model import trial
from qlora_kit.model.trial import try_layers
from tests.fast.models import adapt, load_base
from tests.model.saved_models import save_model


def phimoe():
    return adapt(load_base(save_model("phimoe"), four_bits=False), targets=["q_proj"])


def test_a_trial_changes_nothing():
    model = phimoe()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.random.get_rng_state()
    try_layers(model, "base", "cpu", torch.float32)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("error", [AttributeError("no dtype"), RuntimeError("sizes\ndiffer"), NotImplementedError()])
def test_what_the_librarys_layers_cannot_compute_is_one_line(monkeypatch, error):
    def fail(*_):
        raise error

    model = phimoe()
    monkeypatch.setattr(PhimoeTopKRouter, "forward", fail)
    with pytest.raises(UserError) as refused:
        try_layers(model, "base", "cpu", torch.float32)
    (line,) = refused.value.lines
    assert line.startswith(f"model.name: base: cannot be trained with these settings: its layers fail ({type(error).__name__}")


@pytest.mark.parametrize("error", [RuntimeError("our mistake"), torch.cuda.OutOfMemoryError("out of memory")])
def test_our_own_errors_and_a_full_memory_are_not_hidden(monkeypatch, error):
    def fail(*_):
        raise error

    fail.__code__ = fail.__code__.replace(co_filename=str(trial.KIT / "model" / "loss.py"))
    monkeypatch.setattr(trial, "token_losses", fail)
    with pytest.raises(type(error)):
        try_layers(phimoe(), "base", "cpu", torch.float32)
