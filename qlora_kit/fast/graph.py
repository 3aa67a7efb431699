"""Forward and backward of one micro-batch as a CUDA graph: captured once for a shape, then replayed.

At micro-batch 1 the kernels of a step take longer to launch than to run; a replay launches them as one. Everything around the
micro-step (schedule, clipping, optimizer, logging, saving) stays the Trainer's.

Under capture nothing may wait for the GPU, and every tensor keeps its place: inputs, gradients and the loss live in buffers of
this module. Dropout under recomputation draws each mask twice from two generators in the same state, one for the forward pass and
one for the recomputation; both start each optimizer step from (seed, step), so that a resumed run draws the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from qlora_kit.fast.lora import FusedLinear4bit, count_lora_layers
from qlora_kit.fast.loss import decoder_and_head, takes_mask_by_kind, token_losses

WARM_UP_RUNS = 2  # outside the graph: libraries choose algorithms and allocate workspaces at their first call


class LayerDropout:
    """Masks of one decoder layer; the recomputation draws what the forward pass drew."""

    def __init__(self, device: torch.device):
        self.forward_generator = torch.Generator(device)
        self.recompute_generator = torch.Generator(device)
        self.recomputing = False

    def restart(self, seed: int) -> None:
        self.forward_generator.manual_seed(seed)
        self.recompute_generator.manual_seed(seed)

    def generator(self) -> torch.Generator:
        return self.recompute_generator if self.recomputing else self.forward_generator


class GraphedMicroStep:
    """Call it with a micro-batch: gradients are added to the parameters' `.grad`, the loss is returned.

    A shape that was not captured (the last micro-batch of an epoch may be smaller) runs eagerly, with the same result.
    """

    def __init__(self, model: Any, seed: int):
        self.model, self.seed, self.step = model, seed, 0
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        device = self.parameters[0].device
        self.flat_gradient = torch.zeros(sum(p.numel() for p in self.parameters), device=device)  # one kernel clears it
        self.gradients = [
            part.view_as(p)
            for part, p in zip(self.flat_gradient.split([p.numel() for p in self.parameters]), self.parameters, strict=True)
        ]
        self.dropouts = _give_layers_their_dropout(model, device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.shape: torch.Size | None = None

    def begin_step(self, step: int) -> None:
        """Before the first micro-batch of an optimizer step: clear gradients, and start dropout from (seed, step)."""
        self.flat_gradient.zero_()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        self.step = step
        self._restart_dropout()

    def _restart_dropout(self) -> None:
        for number, dropout in enumerate(self.dropouts):
            dropout.restart(hash((self.seed, self.step, number)) & 0x7FFFFFFF)

    def __call__(self, ids: torch.Tensor, labels: torch.Tensor, tokens_of_step: int) -> torch.Tensor:
        if self.graph is None:
            self._capture(ids, labels)
            self._restart_dropout()  # the warm-up drew from it; a resumed run captures at another step and must draw the same
        if ids.shape != self.shape:
            return self._run(ids, labels, torch.tensor(1.0 / tokens_of_step, device=ids.device))
        assert self.graph is not None
        self.ids.copy_(ids, non_blocking=True)
        self.labels.copy_(labels, non_blocking=True)
        self.share.fill_(1.0 / tokens_of_step)
        self.graph.replay()
        return self.loss

    def _run(self, ids: torch.Tensor, labels: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        loss = token_losses(self.model, ids, labels).sum() * share
        loss.backward()
        return loss.detach()

    def _capture(self, ids: torch.Tensor, labels: torch.Tensor) -> None:
        self.shape = ids.shape
        self.ids, self.labels = ids.clone(), labels.clone()
        self.share = torch.zeros((), device=ids.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                self._run(self.ids, self.labels, self.share)  # share 0: adds nothing to the gradients
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.empty_cache()  # the graph has a pool of its own
        graph = torch.cuda.CUDAGraph()
        for dropout in self.dropouts:
            graph.register_generator_state(dropout.forward_generator)
            graph.register_generator_state(dropout.recompute_generator)
        with torch.cuda.graph(graph):
            self.loss = self._run(self.ids, self.labels, self.share)
        self.graph = graph


def _give_layers_their_dropout(model: Any, device: torch.device) -> list[LayerDropout]:
    """A mask source for each decoder layer, told by the checkpoint when it recomputes."""
    parts = decoder_and_head(model)
    assert parts is not None, "why_not_graphed comes first"
    dropouts = []
    for layer in parts[0].layers:
        dropout = LayerDropout(device)
        for module in layer.modules():
            if isinstance(module, FusedLinear4bit):
                module.dropout_source = dropout
        dropouts.append(dropout)
    base = model.get_base_model()
    if base.is_gradient_checkpointing:
        contexts = {
            "use_reentrant": False,
            "preserve_rng_state": False,
            "context_fn": lambda: (nullcontext(), _recomputing(dropouts)),
        }
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=contexts)
    return dropouts


@contextmanager
def _recomputing(dropouts: list[LayerDropout]) -> Iterator[None]:
    for dropout in dropouts:
        dropout.recomputing = True
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.recomputing = False


def why_not_graphed(model: Any, device: str, dtype: torch.dtype) -> str | None:
    """The reason why this model's micro-steps cannot be captured here, or None."""
    if device != "cuda":
        return "needs a CUDA GPU"
    if dtype != torch.bfloat16:
        return f"computes in {str(dtype).removeprefix('torch.')}; only bfloat16 is captured"
    parts = decoder_and_head(model)
    if parts is None or not takes_mask_by_kind(parts[0]):
        return f"{model.config.model_type} waits for the GPU in its forward pass"
    fused = sum(isinstance(module, FusedLinear4bit) for module in model.modules())
    if fused < count_lora_layers(model):
        return "some LoRA layers are not fused"
    return None
