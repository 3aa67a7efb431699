"""The learning rates of transformers' schedules, to compare with."""

import math

import torch
from transformers import get_scheduler


def library_rates(scheduler: str, steps: int, ratio: float, rate: float = 0.5) -> list[float]:
    """Return the rate of each step, with a warm-up of the ratio of all steps, rounded up."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    schedule, rates = get_scheduler(scheduler, optimizer, math.ceil(ratio * steps), steps), []
    for _ in range(steps):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return rates
