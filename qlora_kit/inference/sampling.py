"""Logits -> the next token of each answer, without waiting for the GPU: fit for a captured graph."""

from typing import NamedTuple

import torch


class Sampling(NamedTuple):
    """What of the settings a graph is made for; the other settings it reads from memory at each step."""

    greedy: bool
    top_k: int
    penalised: bool


def choose(
    logits: torch.Tensor,
    seen: torch.Tensor,
    drawn: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    penalty: torch.Tensor,
    sampling: Sampling,
) -> torch.Tensor:
    """The next token of each row, (B,).

    Repetition penalty (CTRL, arXiv 1909.05858, section 4.1), then temperature, the top_k likeliest tokens, and of these the
    likeliest that make up top_p (nucleus sampling, arXiv 1904.09751), in the order of `transformers`. One number from 0 to 1
    picks the token at which the running sum of probabilities passes it.

    Args:
        logits: (B, vocabulary) in fp32.
        seen: (B, vocabulary), whether a token stands in the prompt or the answer; never that which ends one (`penalise`).
        drawn: (1,), the same for all rows: an answer does not depend on what is written beside it.
    """
    if sampling.penalised:
        logits = penalise(logits, seen, penalty)
    if sampling.greedy:
        return logits.argmax(1)
    logits = logits / temperature
    count = min(sampling.top_k or logits.shape[1], logits.shape[1])
    values, tokens = torch.topk(logits, count) if count < logits.shape[1] else logits.sort(1, descending=True)
    shares = values.softmax(1)
    before = shares.cumsum(1) - shares
    shares = torch.where(before < top_p, shares, 0.0)  # the likeliest always stays
    running = shares.cumsum(1)
    place = (running <= drawn * running[:, -1:]).sum(1, keepdim=True).clamp(max=count - 1)
    return tokens.gather(1, place)[:, 0]


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor | float) -> torch.Tensor:
    """Repetition penalty of the tokens seen, (B, vocabulary).

    The library counts the end of a turn as seen when the prompt holds one, as each chat does, and the model then hardly dares to
    stop: the engines leave tokens that end an answer out of `seen`.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
