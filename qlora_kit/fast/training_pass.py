"""A Llama-like model's training pass without autograd: the layers of layer.py, over the weights of a loaded PEFT model.

The PEFT model stays what is saved, loaded and evaluated elsewhere; this is another way through the same tensors. Nothing here
waits for the GPU and every shape is fixed, so that graph.py can capture it.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from qlora_kit.fast import llama_layer as steps
from qlora_kit.fast import mlp_activation
from qlora_kit.fast.attention import Places, attend, places
from qlora_kit.fast.flat_adapters import FlatAdapters
from qlora_kit.fast.llama_layer import Heads, Part, Reduced, Rotary
from qlora_kit.fast.llama_parts import Layer, ProjectionGroup, lora_of, read_layers, read_rotary_table, why_not_covered
from qlora_kit.fast.nf4 import unpack_stacked
from qlora_kit.fast.projection import Lora
from qlora_kit.fast.sharding import sharded_base
from qlora_kit.model.llama_modules import projections_of
from qlora_kit.model.loss import accumulate_piece, cross_entropy, decoder_and_head, next_labels
from qlora_kit.planning.shape import HEAD_ROWS

GROUPS = ("qkv", "o", "gate_up", "down")  # projections that share an input


class Kept(NamedTuple):
    """What a layer's backward pass finds."""

    h: torch.Tensor
    down_xa: Reduced  # of recomputed layers too: it is small, and making it again would take the activation, the widest tensor
    inner: "Inner | None"  # None: computed again
    parts: tuple[Part, ...] | None  # in the order of GROUPS; None: unpacked again


class Inner(NamedTuple):
    """What stands between a layer's input and its activation."""

    heads: Heads
    qkv_xa: Reduced
    product: torch.Tensor | None
    attended: torch.Tensor  # with autograd's record of the attention alone
    middle: torch.Tensor
    gates: torch.Tensor  # gate and up side by side
    o_xa: Reduced
    gate_up_xa: Reduced


HOST_COPY = "weight_in_host_memory"


def offload_embedding(model: Any) -> int:
    """Move embedding and head (one tensor where they are tied) of a loaded base model to pinned host memory; returns their size.

    FastDecoder alone finds them there. The modules keep nothing, so that nobody who moves the whole model brings them back.
    """
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    copies = {id(module.weight): module.weight.data.cpu().pin_memory() for module in modules}
    for module in modules:
        setattr(module, HOST_COPY, copies[id(module.weight)])
    for module in modules:
        module.weight.data = module.weight.data.new_empty(0)
    torch.cuda.empty_cache()
    return sum(copy.numel() for copy in copies.values())


class FastDecoder:
    """Losses, and gradients into `adapters`, of a PEFT model that `why_not_fast` has no objection to.

    Args:
        recomputed: how many layers, from the first on, keep their input only and compute the rest again in the backward pass.
        compiled: whether torch.compile fuses the steps; the same functions run without it.
        keep_weights: whether what the forward pass unpacked stays for the backward pass.
    """

    def __init__(self, model: Any, recomputed: int, compiled: bool, keep_weights: bool = False):
        parts = decoder_and_head(model)
        assert parts is not None, "why_not_fast comes first"
        self.decoder = parts[0]
        self.embedding, self.head = (
            getattr(module, HOST_COPY, module.weight) for module in (self.decoder.embed_tokens, parts[1])
        )
        self.sharded = sharded_base(model)
        if self.sharded and self.sharded.embedding:
            self.embedding, self.head = self.sharded.embedding, self.sharded.head
        offloaded = hasattr(parts[1], HOST_COPY)
        self.embedded_before = offloaded or not isinstance(self.embedding, torch.Tensor)  # no captured pass can look up there
        self.dtype, self.hidden = self.embedding.dtype, len(self.decoder.norm.weight)
        self.rows = HEAD_ROWS if offloaded else getattr(self.head, "rows", None)
        self.recomputed, self.keep_weights = recomputed, keep_weights
        self.adapters = FlatAdapters([parameter for parameter in model.parameters() if parameter.requires_grad])
        self.layers = read_layers(self.decoder, self.adapters.add)
        assert self.adapters.used == len(self.adapters.flat), "an adapter outside the decoder's projections"
        self.epsilon = self.decoder.norm.variance_epsilon
        self.compiled = compiled
        self._angles: dict[int, Rotary] = {}

    @torch.no_grad()
    def losses(self, inputs: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
        """Loss of each label but the first of each row, (B, T) with a last column of zeros, nats in fp32; no dropout."""
        h, where = self._start(inputs, starts)
        keys = torch.zeros(len(self.layers), len(GROUPS), dtype=torch.int32, device=h.device)
        for number, layer in enumerate(self.layers):
            layer = Layer(layer.norms, *(_without_dropout(getattr(layer, name)) for name in GROUPS))
            with self._whole(number, number + 1):
                h, _ = self._forward(layer, h, where, keys[number], keep_all=False)
        hidden = self._do(steps.rms_norm)(h, self.decoder.norm.weight, self.epsilon)
        losses, _ = cross_entropy(hidden, self.head, next_labels(labels), False, self.rows, accumulate=self._do(accumulate_piece))
        return losses.view_as(labels)

    @torch.no_grad()
    def accumulate(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        share: torch.Tensor,
        keys: torch.Tensor,
        starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add the gradients of share · Σ losses to `adapters.gradient`, and return that loss.

        Args:
            inputs: (B, T) token ids, or (B, T, hidden) their embeddings.
            labels: (B, T).
            share: (), one over the tokens that the optimizer step predicts; in float16 times the scale of the loss.
            keys: (layers, 4) int32, dropout keys.
            starts: (B, T), where each token's record begins (attention.py); None: one record a row.
        """
        h, where = self._start(inputs, starts)
        kept: list[Kept] = []
        for number, layer in enumerate(self.layers):
            with self._whole(number, number + 1):
                h, record = self._forward(layer, h, where, keys[number], keep_all=number >= self.recomputed)
            kept.append(record)
        norm = (self.decoder.norm.weight, self.epsilon)
        hidden = self._do(steps.rms_norm)(h, *norm)
        losses, dh = cross_entropy(hidden, self.head, next_labels(labels), True, self.rows, share, self._do(accumulate_piece))
        assert dh is not None
        del hidden
        dh = self._do(steps.rms_norm_backward)(dh, h, *norm)
        del h
        for number in reversed(range(len(self.layers))):
            with self._whole(number, number - 1):
                dh = self._backward(self.layers[number], dh, kept.pop(), where, keys[number])
        return losses.sum() * share

    def _whole(self, number: int, then: int) -> AbstractContextManager:
        return self.sharded.whole(number, then) if self.sharded else nullcontext()

    def gathering(self, between: Callable[[Callable[[], None]], None]) -> AbstractContextManager:
        """While it lasts, what processes gather within a pass goes through `between`."""
        return self.sharded.gathering(between) if self.sharded else nullcontext()

    def _start(self, inputs: torch.Tensor, starts: torch.Tensor | None) -> tuple[torch.Tensor, Places]:
        h = inputs if inputs.is_floating_point() else self.embed(inputs)
        return h.flatten(0, 1), places(len(inputs), self._rotary(inputs.shape[1], h.device), starts)

    def _forward(
        self, layer: Layer, h: torch.Tensor, where: Places, keys: torch.Tensor, keep_all: bool
    ) -> tuple[torch.Tensor, Kept]:
        """The layer's output, and what its backward pass will find: everything, or `h` alone."""
        qkv, o, gate_up = self._parts(layer, keys, "qkv", "o", "gate_up")
        inner = self._inner(layer, h, where, qkv, o, gate_up, keep_all)
        kept = (qkv, o, gate_up) if keep_all and self.keep_weights else ()
        del qkv, o, gate_up
        (down,) = self._parts(layer, keys, "down")
        activate = self._or_kernel(mlp_activation.activate, mlp_activation.activate_in_one, inner.gates, down.lora)
        out, down_xa = self._do(steps.mlp_output)(inner.middle, *activate(inner.gates, down.lora, down.key), down)
        return out, Kept(h, down_xa, inner if keep_all else None, (*kept, down) if kept else None)

    def _inner(
        self, layer: Layer, h: torch.Tensor, where: Places, qkv: Part, o: Part, gate_up: Part, differentiable: bool
    ) -> Inner:
        split = (where.batch, layer.qkv.sizes)
        heads, qkv_xa, product = self._do(steps.attention_input)(h, *split, qkv, layer.norms, where.rotary)
        attended = attend(heads, where.mask, differentiable)
        middle, gates, o_xa, gate_up_xa = self._do(steps.mlp_input)(h, attended.detach(), o, gate_up, layer.norms)
        return Inner(heads, qkv_xa, product, attended, middle, gates, o_xa, gate_up_xa)

    def _backward(self, layer: Layer, dh: torch.Tensor, kept: Kept, where: Places, keys: torch.Tensor) -> torch.Tensor:
        """Gradient of the layer's input from that of its output; adds the adapters'."""
        h, down_xa, inner, parts = kept
        qkv, o, gate_up = parts[:3] if parts else self._parts(layer, keys, "qkv", "o", "gate_up")
        if inner is None:
            inner = self._inner(layer, h, where, qkv, o, gate_up, True)
        heads, qkv_xa, product, attended, middle, gates, o_xa, gate_up_xa = inner
        down = parts[3] if parts else self._parts(layer, keys, "down")[0]
        dgates = self._gates_backward(dh, gates, down_xa, gate_up_xa, down, gate_up)
        del kept, inner, parts, gates, down  # what is of no more use makes room
        dh, dattended = self._do(steps.mlp_input_backward)(dh, dgates, middle, attended.detach(), o_xa, o, gate_up, layer.norms)
        del dgates, middle, o, gate_up
        dheads = torch.autograd.grad(attended, heads, dattended)
        pieces = self._do(steps.heads_backward)(dheads, product, layer.qkv.sizes, layer.norms, where.rotary)
        return self._do(steps.attention_input_backward)(dh, torch.cat(pieces, 1), h, qkv_xa, qkv, layer.norms)

    def _gates_backward(
        self, dh: torch.Tensor, gates: torch.Tensor, down_xa: Reduced, gate_up_xa: Reduced, down: Part, gate_up: Part
    ) -> torch.Tensor:
        dy, u = self._do(steps.mlp_output_backward)(dh, down_xa, down)
        in_steps, in_one = mlp_activation.activate_backward, mlp_activation.activate_backward_in_one
        backward = self._or_kernel(in_steps, in_one, gates, down.lora, gate_up.lora)
        dgates, sums = backward(dy, u, gates, gate_up_xa, down.key, down.lora, gate_up.lora)
        self._do(mlp_activation.add_sums)(sums, down.gradients, gate_up.gradients)
        return dgates

    def _or_kernel(self, function: Callable, in_one: Callable, gates: torch.Tensor, *adapters: Lora | None) -> Callable:
        return in_one if self.compiled and mlp_activation.has_kernels(gates, *adapters) else self._do(function)

    def _parts(self, layer: Layer, keys: torch.Tensor, *names: str) -> list[Part]:
        """Groups of projections with their weights unpacked."""
        parts = []
        for name in names:
            group: ProjectionGroup = getattr(layer, name)
            B, rank = (group.lora.B, group.lora.rank) if group.lora else ((None,) * len(group.sizes), 0)
            weight = unpack_stacked(group.weights, B, rank, self.dtype)
            parts.append(Part(weight, group.bias, group.lora, group.gradients, keys[GROUPS.index(name)]))
        return parts

    def _do(self, function: Callable) -> Callable:
        return _compiled(function) if self.compiled else function

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, hidden); of an offloaded embedding in host memory. All processes at once where it is divided."""
        if not isinstance(self.embedding, torch.Tensor):
            return self.embedding.lookup(ids)
        return F.embedding(ids.to(self.embedding.device), self.embedding)

    def _rotary(self, length: int, device: torch.device) -> Rotary:
        """Taken from the model once: some kinds of angles wait for the GPU, which a captured pass must not."""
        if length not in self._angles:
            self._angles[length] = read_rotary_table(self.decoder, length, device)
        return self._angles[length]


def _without_dropout(group: ProjectionGroup) -> ProjectionGroup:
    return group if group.lora is None else group._replace(lora=group.lora._replace(keep=1.0))


@functools.cache
def _compiled(function: Callable) -> Callable:
    torch._dynamo.config.recompile_limit = 64  # a run has few shapes: training, evaluation, and smaller ones after out of memory
    return torch.compile(function, fullgraph=True, dynamic=False)


def why_not_fast(model: Any, length: int) -> str | None:
    """Return why a PEFT model cannot be trained by FastDecoder in blocks of `length` tokens, or None if it can."""
    reason, parts = why_not_covered(model, length), decoder_and_head(model)
    if reason or parts is None:
        return reason
    groups = [group for layer in parts[0].layers for group in projections_of(layer)]
    adapted = [[pair for module in group if (pair := lora_of(module))] for group in groups]
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    if not trained or trained != 2 * sum(map(len, adapted)):
        return "the trained parameters are not the LoRA matrices of the decoder's projections"
    if any(len({(len(pair.A), pair.scale, pair.dropout) for pair in group}) > 1 for group in adapted):
        return "projections that share an input differ in rank, scale or dropout"
    return None
