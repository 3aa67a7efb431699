"""All LoRA matrices of a model in one tensor, and their gradients in another.

The 504 matrices of Qwen2.5-3B become one tensor for the optimizer, for clipping and for clearing gradients: one kernel each
instead of hundreds. peft's parameters become views of this tensor, so peft saves and loads them as before.
"""

from typing import Any

import torch

from qlora_kit.fast.llama_parts import lora_of
from qlora_kit.fast.projection import Lora


class FlatAdapters:
    """The LoRA matrices and their gradients, fp32.

    Attributes:
        flat: (elements,), the one tensor that the optimizer has to update.
        gradient: (elements,); `flat.grad` after `clear_gradients`.
        used: elements that `add` has filled.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]):
        size, device = sum(parameter.numel() for parameter in parameters), parameters[0].device
        self.flat = torch.nn.Parameter(torch.empty(size, device=device))
        self.gradient = torch.zeros(size, device=device)
        self.used = 0

    def add(self, modules: list[Any], sizes: tuple[int, ...]) -> tuple[Lora | None, Lora | None]:
        """Move the LoRA matrices of one group of projections into `flat`: first each A, then each B.

        Args:
            modules: the projections; those that are adapted have one rank, scale and dropout (`why_not_fast`).
            sizes: their output sizes.

        Returns:
            views of the matrices and of their gradients; None twice for a group that is not adapted.
        """
        pairs = [lora_of(module) for module in modules]
        adapted = [pair for pair in pairs if pair]
        if not adapted:
            return None, None
        start, rows = self.used, sum(len(pair.A) for pair in adapted)
        for pair in adapted:
            self._move(pair.A)
        stop = self.used
        B = tuple(pair and self._move(pair.B) for pair in pairs)
        gradients = tuple(None if view is None else self.gradient_of(view) for view in B)
        lora = Lora(self.flat.data[start:stop].view(rows, -1), B, sizes, adapted[0].scale, 1.0 - adapted[0].dropout)
        return lora, lora._replace(A=self.gradient[start:stop].view(rows, -1), B=gradients)

    def _move(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        view = self.flat.data[self.used : self.used + parameter.numel()].view_as(parameter)
        view.copy_(parameter.data)
        parameter.data = view
        self.used += parameter.numel()
        return view

    def gradient_of(self, view: torch.Tensor) -> torch.Tensor:
        """Return the part of `gradient` that belongs to a view of `flat`, in the shape of the view."""
        start = view.storage_offset()
        return self.gradient[start : start + view.numel()].view_as(view)

    def clear_gradients(self) -> None:
        """Set the gradient to zero, and make it the `.grad` of `flat`, where the optimizer looks."""
        self.gradient.zero_()
        self.flat.grad = self.gradient
