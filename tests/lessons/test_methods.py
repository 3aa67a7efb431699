"""Test the lesson of methods: parameters by hand, the adapter's formula, merging, and gradients."""

import pytest
import torch
from rich.cells import cell_len
from torch import nn

from finetuning_lessons.layers import count_parameters
from finetuning_lessons.lesson import PRINTED_WIDTH, load_model
from finetuning_lessons.methods import (
    BOTTLENECK,
    METHODS,
    STEPS,
    TIME,
    VIRTUAL_TOKENS,
    Adapter,
    Facts,
    draw,
    print_findings,
    print_losses,
    print_times,
    time_forward,
    try_to_merge,
)
from finetuning_lessons.seeds import load_results
from finetuning_lessons.words import choose

# The embedded model: 6 layers, hidden 192, 2 x 32 wide keys and values, MLP 512.
LAYERS, HIDDEN, KEYS, MLP = 6, 192, 64, 512
TRAINABLE = {
    "full": 3_543_360,
    "LoRA": 16 * LAYERS * (2 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + KEYS) + 3 * (HIDDEN + MLP)),
    "adapter": 2 * LAYERS * (2 * HIDDEN * BOTTLENECK + BOTTLENECK + HIDDEN),  # two matrices and two biases, twice a layer
    "prefix": VIRTUAL_TOKENS * LAYERS * 2 * KEYS,  # a key and a value in each layer
    "prompt": VIRTUAL_TOKENS * HIDDEN,
    "IA3": LAYERS * (2 * KEYS + MLP),
}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(2 * 16).view(2, 16)


@pytest.mark.parametrize("name", METHODS)
def test_trainable_parameters_by_hand(name):
    assert count_parameters(METHODS[name].apply(load_model()))[0] == TRAINABLE[name]


@pytest.mark.parametrize("name", ["full", "LoRA", "adapter", "IA3"])
def test_training_starts_from_the_base_model(name, ids):
    base, model = load_model().eval(), METHODS[name].apply(load_model()).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_only_what_the_method_adds_gets_a_gradient(name, ids):
    base = load_model()
    before = {id(parameter) for parameter in base.parameters()}
    model = METHODS[name].apply(base)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with_gradient = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert with_gradient and not before & {id(parameter) for parameter in with_gradient}


def test_adapter_by_hand():
    """y = x; down = [1, 1], up = [[2], [0]]: (3, -1) -> relu(2) · (2, 0) added; (-3, 1) -> relu(-2) = 0."""
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.eye(2)
    adapter = Adapter(linear, 1)
    adapter.down.weight.data, adapter.up.weight.data = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0], [0.0]])
    nn.init.zeros_(adapter.down.bias)
    assert adapter(torch.tensor([[3.0, -1.0], [-3.0, 1.0]])).tolist() == [[7.0, -1.0], [-3.0, 1.0]]


@pytest.mark.parametrize(
    ("name", "verdict"),
    [("full", "is"), ("LoRA", "yes"), ("adapter", "no"), ("prefix", "no"), ("prompt", "no"), ("IA3", "yes")],
)
def test_lora_and_ia3_merge_and_the_others_do_not(name, verdict, ids):
    torch.manual_seed(0)
    model = METHODS[name].apply(load_model())
    for parameter in model.parameters():  # an update of zero would always merge
        if parameter.requires_grad and name != "full":
            parameter.data += 0.05 * torch.randn_like(parameter)
    said, merged = try_to_merge(model, ids)
    assert said.startswith(verdict) and (merged is not None) == (verdict == "yes")
    if merged is not None:
        assert count_parameters(merged)[1] == TRAINABLE["full"]


def test_every_model_is_timed(ids):
    times = time_forward({"a": load_model(), "b": load_model()}, ids, rounds=2)
    assert set(times) == {"a", "b"} and all(0 < milliseconds < 10_000 for milliseconds in times.values())


def test_what_is_stored_is_printed_and_drawn(capsys, tmp_path):
    results = load_results("methods", {"steps": STEPS})
    one, facts = results.measured[0], {name: Facts(trainable, "yes") for name, trainable in TRAINABLE.items()}
    for language in ("zh-TW", "en"):
        choose(language)
        print_losses(one, results, facts, STEPS)
        print_times(one, results, facts)
        print_findings(results, facts)
    draw(tmp_path / "methods.png", one, results, facts)
    printed = capsys.readouterr().out
    assert max(cell_len(line.rstrip()) for line in printed.splitlines() if not line.startswith("picture")) <= PRINTED_WIDTH
    assert "325,632" in printed and "9.19 %" in printed and (tmp_path / "methods.png").exists()
    longer = sum(100 * (seed[TIME]["LoRA"] / seed[TIME]["full"] - 1) for seed in results.measured) / len(results.seeds)
    assert f"+{longer:.0f} ± " in printed
