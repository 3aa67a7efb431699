"""Errors of low-rank copies of a matrix: the least possible, by singular values, and what training A and B reaches."""

import torch
from torch import Tensor

from finetuning_lessons.layers import LoRALayer

FIT_STEPS = 300


def best_errors(update: Tensor, ranks: tuple[int, ...]) -> list[float]:
    """Return the relative Frobenius error of the best approximation of `update` (out, in) at each rank."""
    squares = torch.linalg.svdvals(update).square()
    return [float((squares[rank:].sum() / squares.sum()).sqrt()) for rank in ranks]


def fitted_error(update: Tensor, rank: int) -> float:
    """Return the relative Frobenius error of a LoRALayer trained by gradient descent to copy `update` (out, in)."""
    torch.manual_seed(0)
    target = update / update.square().mean().sqrt()  # so that one learning rate fits updates of any size
    layer = LoRALayer(target.shape[1], target.shape[0], rank, alpha=2.0 * rank)  # (in, out)
    optimizer = torch.optim.Adam([layer.lora_A.weight, layer.lora_B.weight], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_STEPS)
    for _ in range(FIT_STEPS):
        loss = (layer.update() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float((layer.update().detach() - target).norm() / target.norm())


def pooled_errors(updates: list[Tensor], ranks: tuple[int, ...]) -> list[float]:
    """Return best_errors of many matrices taken together: the sums of squared errors over the sum of squared norms."""
    norms = torch.tensor([float(update.square().sum()) for update in updates])
    errors = torch.tensor([best_errors(update, ranks) for update in updates])  # (matrices, ranks)
    return ((errors.square() * norms[:, None]).sum(0) / norms.sum()).sqrt().tolist()
