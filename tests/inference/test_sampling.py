"""choose_tokens against the probabilities of the library's logits processors."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from qlora_kit.inference.sampling import Sampling, SamplingTensors, choose_tokens


@pytest.mark.parametrize("changes", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.7, "temperature": 0.5}, {}], ids=str)
def test_tokens_are_chosen_with_the_probabilities_of_the_librarys_processors(changes):
    settings = {"temperature": 1.5, "top_k": 0, "top_p": 1.0} | changes
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.0, -1.0, 0.5]])
    expected = TemperatureLogitsWarper(settings["temperature"])(None, logits.clone())
    if settings["top_k"]:
        expected = TopKLogitsWarper(settings["top_k"])(None, expected)
    if settings["top_p"] < 1:
        expected = TopPLogitsWarper(settings["top_p"])(None, expected)
    tensors = SamplingTensors(*(torch.tensor(value) for value in (settings["temperature"], settings["top_p"], 1.0)))
    seen, sampling, count = torch.zeros(1, 6, dtype=torch.bool), Sampling(False, settings["top_k"], False), 2000
    uniform = ((torch.arange(count) + 0.5) / count).split(1)
    chosen = torch.cat([choose_tokens(logits, seen, number, tensors, sampling) for number in uniform])
    torch.testing.assert_close(torch.bincount(chosen, minlength=6) / count, expected.softmax(1)[0], atol=1.5 / count, rtol=0)
