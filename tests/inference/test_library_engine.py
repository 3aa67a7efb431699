"""The parts of LibraryEngine that differ from the library's own `generate`."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from qlora_kit.inference import library_engine
from tests.inference.engines import load_adapted


@pytest.mark.parametrize("padding", [[], [8, 8]], ids=["no padding", "padding"])
def test_a_token_that_ends_an_answer_is_never_penalised(tiny_dir, padding):
    """All other tokens of the prompt are penalised as in the library, and padding is not."""
    prompt, stop = [3, 5, 7, 9], 5
    logits = load_adapted(tiny_dir)(torch.tensor([prompt])).logits[:, -1].detach()
    logits[0, stop] = logits.max() + 0.5  # the most probable token, unless it is penalised
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([prompt]), logits.clone())
    assert expected.argmax() != stop
    expected[0, stop] = logits[0, stop]
    actual = library_engine._Penalty(1.5, [len(padding)], [stop])(torch.tensor([padding + prompt]), logits.clone())
    torch.testing.assert_close(actual, expected)
