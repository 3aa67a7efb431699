"""All LoRA matrices of a model in one tensor, their gradients in another.

504 tensors of Qwen2.5-3B become one for the optimizer, for clipping and for clearing gradients: one kernel each instead of
hundreds. peft's parameters become views of it, so that saving and loading stay peft's own.
"""

from typing import Any

import torch

from qlora_kit.fast.projection import Lora


class FlatAdapters:
    """`flat` is what the optimizer sees; `add` hands out its parts in the order in which a layer uses them."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        size, device = sum(parameter.numel() for parameter in parameters), parameters[0].device
        self.flat = torch.nn.Parameter(torch.empty(size, device=device))
        self.gradient = torch.zeros(size, device=device)
        self.used = 0

    def add(
        self, A: list[torch.nn.Parameter], B: list[torch.nn.Parameter | None], sizes: tuple[int, ...], scale: float, keep: float
    ) -> tuple[Lora, Lora]:
        """Move the adapters of one group of projections in; returns views of them and of their gradients."""
        start = self.used
        values = [self._move(parameter) if parameter is not None else None for parameter in [*A, *B]]
        rank_rows = sum(len(parameter) for parameter in A)
        stop = start + sum(parameter.numel() for parameter in A)
        gradients = [value if value is None else self.gradient_of(value) for value in values]

        def lora(flat: torch.Tensor, parts: list[torch.Tensor | None]) -> Lora:
            return Lora(flat[start:stop].view(rank_rows, -1), tuple(parts[len(A) :]), sizes, scale, keep)

        return lora(self.flat.data, values), lora(self.gradient, gradients)

    def _move(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        place = self.flat.data[self.used : self.used + parameter.numel()].view_as(parameter)
        place.copy_(parameter.data)
        parameter.data = place
        self.used += parameter.numel()
        return place

    def gradient_of(self, view: torch.Tensor) -> torch.Tensor:
        start = view.storage_offset()
        return self.gradient[start : start + view.numel()].view_as(view)

    def clear_gradients(self) -> None:
        """Zero, and visible to the optimizer and to the Trainer through `.grad`."""
        self.gradient.zero_()
        self.flat.grad = self.gradient


def lora_tensors(module: Any) -> tuple[torch.nn.Parameter, torch.nn.Parameter] | None:
    """A and B of a projection, or None when it has no LoRA update."""
    if not hasattr(module, "lora_A"):
        return None
    (name,) = module.active_adapters
    return module.lora_A[name].weight, module.lora_B[name].weight
