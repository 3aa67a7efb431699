"""The fast training pass for a training loop of one's own."""

import warnings
from typing import Literal

import torch
from peft import PeftModel

from qlora_kit.errors import UserError
from qlora_kit.fast.micro_step import MicroStep, StepSettings, why_not_compiled, why_not_graphed, why_not_used
from qlora_kit.fast.training_pass import FastDecoder, why_not_fast
from qlora_kit.model.loss import IGNORED


class FastStep:
    """Forward and backward pass of a PEFT model, without autograd.

        fast = FastStep(model, rows=4, length=512)
        optimizer = torch.optim.AdamW(fast.parameters, lr=2e-4)
        for ids, labels in batches:  # (16, 512) each: four passes for one optimizer step
            loss = fast.step(ids, labels)
            optimizer.step()
            optimizer.zero_grad()

    LoRA dropout and gradient checkpointing are those of the model. Its LoRA matrices become views of `parameters`, so the model
    evaluates and saves what was trained. An optimizer of model.parameters() works too, with one kernel for each matrix.

    Args:
        model: a Llama-like base model with one LoRA adapter, on one device.
        rows: sequences in one pass; a batch with more of them is cut up.
        length: tokens of every sequence.
        seed: of dropout.
        compiled: whether torch.compile fuses operations; "auto": where it works.
        captured: whether a pass is replayed as a CUDA graph; "auto": where it works.

    Attributes:
        parameters: the list for the optimizer: all LoRA matrices in one tensor.

    Raises:
        UserError: the pass does not cover this model, or `compiled` or `captured` is True and cannot work.
    """

    def __init__(
        self,
        model: PeftModel,
        rows: int,
        length: int,
        *,
        seed: int = 42,
        compiled: bool | Literal["auto"] = "auto",
        captured: bool | Literal["auto"] = "auto",
    ):
        if reason := why_not_fast(model, length):
            raise UserError("model", None, f"has no fast training pass ({reason})", "train it with autograd")
        device = model.device.type
        use_compile = why_not_used("compiled", compiled, why_not_compiled(device)) is None
        use_graphs = why_not_used("captured", captured, why_not_graphed(device)) is None
        may_fall_back = (use_compile or use_graphs) and True not in (compiled, captured)
        self.lora = [parameter for parameter in model.parameters() if parameter.requires_grad]
        decoder = FastDecoder(model, len(model.get_decoder().layers) if model.is_gradient_checkpointing else 0, use_compile)
        self.micro = MicroStep(decoder, StepSettings(rows, length, seed, use_graphs), _warn if may_fall_back else None)
        self.parameters = [decoder.adapters.flat]
        self.rows, self.length, self.steps = rows, length, 0

    def step(self, ids: torch.Tensor, labels: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Add the gradients of scale · loss to those of earlier calls since they were last cleared.

        Args:
            ids, labels: (any number of rows, length); no loss is taken where a label is -100.
            scale: 1 / n averages n calls; in float16, the scale of a GradScaler.

        Returns:
            the mean loss over the batch's labels, (), in nats a token.

        Raises:
            ValueError: ids and labels have the wrong shape.
            RuntimeError: the LoRA matrices are no longer views of `parameters`.
        """
        if ids.shape != labels.shape or ids.shape[1:] != (self.length,):
            raise ValueError(f"ids {tuple(ids.shape)} and labels {tuple(labels.shape)}: should be (rows, {self.length})")
        self._begin_if_cleared()
        tokens = (labels[:, 1:] != IGNORED).sum().clamp(min=1)
        passes = zip(ids.split(self.rows), labels.split(self.rows), strict=True)
        return sum((self.micro.train(*each, scale / tokens) for each in passes), torch.zeros(())) / scale

    def _begin_if_cleared(self) -> None:
        """Begin an optimizer step if any gradient is None: zero_grad of the optimizer or the model sets it so."""
        adapters = self.micro.decoder.adapters
        if self.lora[0].untyped_storage().data_ptr() != adapters.flat.untyped_storage().data_ptr():
            raise RuntimeError("the model was moved, or given to another FastStep: make a new FastStep, then the optimizer")
        if all(parameter.grad is not None for parameter in (adapters.flat, *self.lora)):
            return
        self.micro.begin_step(self.steps)
        self.steps += 1
        for matrix in self.lora:
            matrix.grad = adapters.gradient_of(matrix)


def _warn(reason: str) -> None:
    warnings.warn(f"compiling or capturing failed ({reason}): continuing without, which is slower", stacklevel=2)
