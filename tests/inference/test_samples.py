"""Answers to fixed prompts while a model trains."""

import pytest
import torch

from qlora_kit.config import Config
from qlora_kit.config_file import override
from qlora_kit.errors import UserError
from qlora_kit.inference import samples
from qlora_kit.inference.samples import build_sampler
from tests.inference.engines import decode_without_cache, load_adapted

PROMPTS = ["The river", "A lighthouse is in the"]


def build(tokenizer, style="text", evaluates=True, **changes):
    settings = {"training.sample_prompts": PROMPTS} | {key.replace("__", "."): value for key, value in changes.items()}
    return build_sampler(override(Config(), settings), tokenizer, style, evaluates)


@pytest.fixture(scope="module")
def tokenizer(tiny_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_dir)


@pytest.mark.parametrize("training", [True, False])
def test_the_answers_are_the_likeliest_tokens_and_nothing_else_changes(two_layers_dir, tokenizer, monkeypatch, training):
    monkeypatch.setattr(samples, "SAMPLE_TOKENS", 12)
    model = load_adapted(two_layers_dir).train(training)
    state = torch.get_rng_state()
    answers = build(tokenizer)(model)
    assert torch.equal(torch.get_rng_state(), state) and model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = decode_without_cache(model, tokenizer(prompt)["input_ids"], 12)
        end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else 12
        assert answer == tokenizer.decode(ids[:end], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"performance__fsdp": True}, "performance.fsdp"),
        ({"performance__offload_embedding": True}, "performance.offload_embedding"),
        ({"evaluates": False}, "data.eval_split is null"),
        ({"data__max_length": 8, "training__sample_prompts": ["word " * 9]}, "more than data.max_length"),
    ],
)
def test_a_run_that_cannot_answer_is_refused(tokenizer, changes, problem):
    with pytest.raises(UserError) as refused:
        build(tokenizer, **changes)
    (line,) = refused.value.lines
    assert line.startswith("training.sample_prompts: ") and problem in line


@pytest.mark.parametrize("none", [None, []])
def test_without_prompts_nothing_is_answered(tokenizer, none):
    assert build(tokenizer, training__sample_prompts=none) is None
