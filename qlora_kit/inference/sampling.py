"""Temperature, top_k, top_p and repetition penalty, without waiting for the GPU, so that a CUDA graph can contain them."""

from typing import NamedTuple

import torch


class Sampling(NamedTuple):
    """Settings that shape the computation: a CUDA graph is captured for each combination."""

    greedy: bool
    top_k: int  # 0: all tokens
    penalised: bool


class SamplingTensors(NamedTuple):
    """Settings that a CUDA graph reads from memory at each step, () each, in fp32."""

    temperature: torch.Tensor
    top_p: torch.Tensor
    penalty: torch.Tensor


def choose_tokens(
    logits: torch.Tensor, seen: torch.Tensor, uniform: torch.Tensor, tensors: SamplingTensors, sampling: Sampling
) -> torch.Tensor:
    """Return the next token of each row, (B,).

    In the order of transformers: the repetition penalty (CTRL, arXiv 1909.05858, section 4.1), the temperature, the top_k most
    probable tokens, and of these the most probable that make up top_p (nucleus sampling, arXiv 1904.09751). The token is the one
    at which the cumulative probability passes a random number.

    Args:
        logits: (B, vocabulary) in fp32.
        seen: (B, vocabulary), tokens of the prompt and the answer, without those that end an answer (`penalise`).
        uniform: (1,), the random number from 0 to 1; the same for all rows, so an answer does not depend on the other rows.
    """
    if sampling.penalised:
        logits = penalise(logits, seen, tensors.penalty)
    if sampling.greedy:
        return logits.argmax(1)
    logits = logits / tensors.temperature
    count = min(sampling.top_k or logits.shape[1], logits.shape[1])
    values, tokens = torch.topk(logits, count) if count < logits.shape[1] else logits.sort(1, descending=True)
    probabilities = values.softmax(1)
    before = probabilities.cumsum(1) - probabilities
    probabilities = torch.where(before < tensors.top_p, probabilities, 0.0)  # the most probable token always stays
    cumulative = probabilities.cumsum(1)
    place = (cumulative <= uniform * cumulative[:, -1:]).sum(1, keepdim=True).clamp(max=count - 1)
    return tokens.gather(1, place)[:, 0]


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor | float) -> torch.Tensor:
    """Return the logits, (B, vocabulary), with the repetition penalty on the tokens seen.

    The engines leave the tokens that end an answer out of `seen`. The library counts them, every chat prompt contains them, and
    the model would then hardly ever end its answer.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
