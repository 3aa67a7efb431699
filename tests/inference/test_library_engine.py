"""The parts of LibraryEngine that differ from the library's own `generate`."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from qlora_kit.inference import library_engine
from tests.inference.engines import answer, decode_without_cache, greedy, load_adapted
from tests.model.random_models import build_model


@pytest.mark.parametrize("padding", [[], [8, 8]], ids=["no padding", "padding"])
def test_a_token_that_ends_an_answer_is_never_penalised(two_layers_dir, padding):
    """All other tokens of the prompt are penalised as in the library, and padding is not."""
    prompt, stop = [3, 5, 7, 9], 5
    logits = load_adapted(two_layers_dir)(torch.tensor([prompt])).logits[:, -1].detach()
    logits[0, stop] = logits.max() + 0.5  # the most probable token, unless it is penalised
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([prompt]), logits.clone())
    assert expected.argmax() != stop
    expected[0, stop] = logits[0, stop]
    actual = library_engine._Penalty(1.5, [len(padding)], [stop])(torch.tensor([padding + prompt]), logits.clone())
    torch.testing.assert_close(actual, expected)


def test_prompts_of_different_length_are_answered_as_each_alone_where_the_length_decides_the_angles():
    """With longrope, this model has other angles from 17 tokens on."""
    model, prompts = build_model("phi3"), [list(range(100, 110)), list(range(200, 220))]
    engine = library_engine.LibraryEngine(model, 0)
    expected = [decode_without_cache(model, prompt, 5) for prompt in prompts]
    assert answer(engine, prompts, greedy(max_new_tokens=5)) == expected
    stop = expected[0][2]  # ends the first answer before the second
    assert stop not in expected[0][:2] + expected[1]
    assert answer(engine, prompts, greedy(max_new_tokens=5), stop_ids=[stop]) == [expected[0][:3], expected[1]]
