"""Forward and backward pass of a Llama-like model without autograd: the steps of llama_layer.py on a PEFT model's own tensors.

The PEFT model is still what evaluates, saves and loads. Nothing here waits for the GPU and all shapes are fixed, so that
micro_step.py can capture a pass as a CUDA graph.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel

from qlora_kit.fast import llama_layer, mlp_activation
from qlora_kit.fast.attention import BlockLayout, RotaryTables, attend, lay_out_blocks
from qlora_kit.fast.flat_adapters import FlatAdapters
from qlora_kit.fast.llama_layer import Heads, UnpackedGroup
from qlora_kit.fast.llama_parts import Layer, ProjectionGroup, lora_of, read_layers, read_rotary_table, why_not_covered
from qlora_kit.fast.nf4 import unpack_stacked
from qlora_kit.fast.projection import Lora
from qlora_kit.fast.sharding import sharded_base
from qlora_kit.model.llama_modules import projections_of
from qlora_kit.model.loss import accumulate_piece, cross_entropy, decoder_and_head, next_labels
from qlora_kit.model.records import longest_short_text
from qlora_kit.planning.shape import HEAD_ROWS

GROUPS = ("qkv", "o", "gate_up", "down")  # fields of Layer; each draws its own dropout key


class Activations(NamedTuple):
    """A layer's activations from its input to gate and up, which its backward pass needs."""

    heads: Heads
    qkv_xa: torch.Tensor | None
    product: torch.Tensor | None  # of q, k and v, where they have norms of their own
    attended: torch.Tensor  # autograd has recorded the attention that made it, and nothing else
    middle: torch.Tensor  # the residual after attention
    gates: torch.Tensor  # gate and up side by side
    o_xa: torch.Tensor | None
    gate_up_xa: torch.Tensor | None


class SavedLayer(NamedTuple):
    """Tensors that a layer keeps for its backward pass."""

    h: torch.Tensor
    down_xa: torch.Tensor | None  # kept by every layer: it is small, and recomputing it takes the widest tensor, silu(gate) · up
    activations: Activations | None  # None: recomputed


HOST_COPY = "weight_in_host_memory"


def offload_embedding(model: Any) -> int:
    """Move the embedding and output head of a base model to pinned host memory, where FastDecoder finds them.

    The modules' own weights become empty, so that moving the model to a GPU does not bring them back.

    Returns:
        the number of weights moved; a tied embedding counts once.
    """
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    copies = {id(module.weight): module.weight.data.cpu().pin_memory() for module in modules}
    for module in modules:
        setattr(module, HOST_COPY, copies[id(module.weight)])
        module.weight.data = module.weight.data.new_empty(0)
    torch.cuda.empty_cache()
    return sum(copy.numel() for copy in copies.values())


class FastDecoder:
    """Losses of a PEFT model, and their gradients into `adapters`; `why_not_fast` says which models it covers.

    Args:
        recomputed: layers with gradient checkpointing, counted from the first: they keep their input and recompute the rest.
        compiled: whether torch.compile fuses the steps of a layer.
    """

    def __init__(self, model: PeftModel, recomputed: int, compiled: bool):
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
        # No CUDA graph can look tokens up in host memory, or gather them from other processes.
        self.embeds_outside_graph = offloaded or not isinstance(self.embedding, torch.Tensor)
        self.dtype, self.hidden = self.embedding.dtype, len(self.decoder.norm.weight)
        self.head_rows = HEAD_ROWS if offloaded else getattr(self.head, "rows", None)
        self.recomputed, self.compiled = recomputed, compiled
        self.adapters = FlatAdapters([parameter for parameter in model.parameters() if parameter.requires_grad])
        self.layers = read_layers(self.decoder, self.adapters.add)
        assert self.adapters.used == len(self.adapters.flat), "an adapter outside the decoder's projections"
        self.epsilon = self.decoder.norm.variance_epsilon
        self._rotary_tables: dict[int, RotaryTables] = {}

    @torch.no_grad()
    def losses(
        self, inputs: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor | None = None, most_records: int = 0
    ) -> torch.Tensor:
        """Return the loss of each label but the first of each row, without dropout.

        Returns:
            (B, T) in fp32, nats; position t holds the loss of label t + 1, and the last column is zero.
        """
        h, layout = self._embed_and_lay_out(inputs, starts, most_records)
        keys = torch.zeros(len(self.layers), len(GROUPS), dtype=torch.int32, device=h.device)
        for number, layer in enumerate(self.layers):
            layer = Layer(layer.norms, *map(_without_dropout, layer[1:]))
            with self._gathered(number, number + 1):
                h, _ = self._forward(layer, h, layout, keys[number], keep_all=False)
        hidden = self._compiled(llama_layer.rms_norm)(h, self.decoder.norm.weight, self.epsilon)
        accumulate = self._compiled(accumulate_piece)
        losses, _ = cross_entropy(hidden, self.head, next_labels(labels), False, self.head_rows, accumulate=accumulate)
        return losses.view_as(labels)

    @torch.no_grad()
    def accumulate(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        loss_scale: torch.Tensor,
        keys: torch.Tensor,
        starts: torch.Tensor | None = None,
        most_records: int = 0,
    ) -> torch.Tensor:
        """Add the gradients of loss_scale · Σ losses to `adapters.gradient`, and return that scaled loss, ().

        Args:
            inputs: (B, T) token ids, or (B, T, hidden) their embeddings.
            labels: (B, T).
            loss_scale: (), 1 / the tokens that the optimizer step predicts; in float16 times the scale of the GradScaler.
            keys: (layers, 4), int32, of the dropout masks.
            starts: (B, T), the index at which each token's record begins (attention.py); None: one record a row.
            most_records: at least the records of each row, padding counted as one; 0 if that is not known, which is slower.
        """
        h, layout = self._embed_and_lay_out(inputs, starts, most_records)
        saved: list[SavedLayer] = []
        for number, layer in enumerate(self.layers):
            with self._gathered(number, number + 1):
                h, record = self._forward(layer, h, layout, keys[number], keep_all=number >= self.recomputed)
            saved.append(record)
        norm = (self.decoder.norm.weight, self.epsilon)
        hidden = self._compiled(llama_layer.rms_norm)(h, *norm)
        accumulate = self._compiled(accumulate_piece)
        losses, dh = cross_entropy(hidden, self.head, next_labels(labels), True, self.head_rows, loss_scale, accumulate)
        assert dh is not None
        del hidden
        dh = self._compiled(llama_layer.rms_norm_backward)(dh, h, *norm)
        del h
        for number in reversed(range(len(self.layers))):
            with self._gathered(number, number - 1):
                dh = self._backward(self.layers[number], dh, saved.pop(), layout, keys[number])
        return losses.sum() * loss_scale

    def _gathered(self, number: int, then: int) -> AbstractContextManager:
        """Hold a layer's weights while the context lasts, and start to gather those of the layer that comes next."""
        return self.sharded.gathered(number, then) if self.sharded else nullcontext()

    def intercept_gathers(self, handle: Callable[[Callable[[], None]], None]) -> AbstractContextManager:
        """Pass each gather of a sharded base to `handle` instead of running it, while the context lasts."""
        return self.sharded.intercept_gathers(handle) if self.sharded else nullcontext()

    def _embed_and_lay_out(
        self, inputs: torch.Tensor, starts: torch.Tensor | None, most_records: int
    ) -> tuple[torch.Tensor, BlockLayout]:
        h = inputs if inputs.is_floating_point() else self.embed(inputs)
        tables = self._rotary_table(inputs.shape[1], h.device)
        return h.flatten(0, 1), lay_out_blocks(len(inputs), tables, starts, most_records)

    def _forward(
        self, layer: Layer, h: torch.Tensor, layout: BlockLayout, keys: torch.Tensor, keep_all: bool
    ) -> tuple[torch.Tensor, SavedLayer]:
        """Return a layer's output, and what its backward pass needs: all activations, or `h` and xa of `down` alone."""
        activations = self._compute_activations(layer, h, layout, self._unpack(layer, keys, "qkv", "o", "gate_up"), keep_all)
        (down,) = self._unpack(layer, keys, "down")
        activate = self._kernel_or_compiled(mlp_activation.activate_triton, mlp_activation.activate, activations.gates, down.lora)
        mlp_output = self._compiled(llama_layer.mlp_output)
        out, down_xa = mlp_output(activations.middle, *activate(activations.gates, down.lora, down.key), down)
        return out, SavedLayer(h, down_xa, activations if keep_all else None)

    def _compute_activations(
        self, layer: Layer, h: torch.Tensor, layout: BlockLayout, groups: list[UnpackedGroup], differentiable: bool
    ) -> Activations:
        qkv, o, gate_up = groups
        sizes = (layout.batch, layer.qkv.sizes)
        heads, qkv_xa, product = self._compiled(llama_layer.attention_input)(h, *sizes, qkv, layer.norms, layout.rotary)
        attended = attend(heads, layout, differentiable)
        mlp_input = self._compiled(llama_layer.mlp_input)
        middle, gates, o_xa, gate_up_xa = mlp_input(h, attended.detach(), o, gate_up, layer.norms)
        return Activations(heads, qkv_xa, product, attended, middle, gates, o_xa, gate_up_xa)

    def _backward(
        self, layer: Layer, dh: torch.Tensor, saved: SavedLayer, layout: BlockLayout, keys: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient of a layer's input, given that of its output, and add to the gradients of its LoRA matrices."""
        h, down_xa, activations = saved
        groups = self._unpack(layer, keys, "qkv", "o", "gate_up")
        if activations is None:
            activations = self._compute_activations(layer, h, layout, groups, True)
        qkv, o, gate_up = groups
        del groups
        heads, qkv_xa, product, attended, middle, gates, o_xa, gate_up_xa = activations
        (down,) = self._unpack(layer, keys, "down")
        dy, u = self._compiled(llama_layer.mlp_output_backward)(dh, down_xa, down)
        activate_backward = self._kernel_or_compiled(
            mlp_activation.activate_backward_triton, mlp_activation.activate_backward, gates, down.lora, gate_up.lora
        )
        dgates, sums = activate_backward(dy, u, gates, gate_up_xa, down.key, down.lora, gate_up.lora)
        self._compiled(mlp_activation.add_sums)(sums, down.gradients, gate_up.gradients)
        del saved, activations, gates, down, dy, u, sums  # frees the memory of what is no longer needed
        mlp_input_backward = self._compiled(llama_layer.mlp_input_backward)
        dh, dattended = mlp_input_backward(dh, dgates, middle, attended.detach(), o_xa, o, gate_up, layer.norms)
        del dgates, middle, o, gate_up
        dheads = torch.autograd.grad(attended, heads, dattended)
        pieces = self._compiled(llama_layer.heads_backward)(dheads, product, layer.qkv.sizes, layer.norms, layout.rotary)
        return self._compiled(llama_layer.attention_input_backward)(dh, torch.cat(pieces, 1), h, qkv_xa, qkv, layer.norms)

    def _unpack(self, layer: Layer, keys: torch.Tensor, *names: str) -> list[UnpackedGroup]:
        groups = []
        for name in names:
            group: ProjectionGroup = getattr(layer, name)
            B, rank = (group.lora.B, group.lora.rank) if group.lora else ((None,) * len(group.sizes), 0)
            weight = unpack_stacked(group.weights, B, rank, self.dtype)
            groups.append(UnpackedGroup(weight, group.bias, group.lora, group.gradients, keys[GROUPS.index(name)]))
        return groups

    def _kernel_or_compiled(self, kernel: Callable, function: Callable, gates: torch.Tensor, *adapters: Lora | None) -> Callable:
        return kernel if self.compiled and mlp_activation.has_kernels(gates, *adapters) else self._compiled(function)

    def _compiled(self, function: Callable) -> Callable:
        return compile_once(function) if self.compiled else function

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of (B, T) tokens, (B, T, hidden), in host memory if the embedding is offloaded.

        If the embedding is sharded, all processes have to call this at once.
        """
        if not isinstance(self.embedding, torch.Tensor):
            return self.embedding.lookup(ids)
        return F.embedding(ids.to(self.embedding.device), self.embedding)

    def _rotary_table(self, length: int, device: torch.device) -> RotaryTables:
        """Read the tables once: for some kinds of angles the model waits for the GPU, which a captured pass must not do."""
        if length not in self._rotary_tables:
            short = longest_short_text(self.decoder.config, length)
            tables = [read_rotary_table(self.decoder, count, device) for count in (length, short) if count]
            self._rotary_tables[length] = RotaryTables(*tables)
        return self._rotary_tables[length]


def _without_dropout(group: ProjectionGroup) -> ProjectionGroup:
    return group if group.lora is None else group._replace(lora=group.lora._replace(keep=1.0))


@functools.cache
def compile_once(function: Callable) -> Callable:
    """Return a function compiled for each shape that it meets; the same compiled function for the same function."""
    torch._dynamo.config.recompile_limit = 64  # shapes of training, of evaluation, and smaller ones after out of memory
    return torch.compile(function, fullgraph=True, dynamic=False)


def why_not_fast(model: PeftModel, length: int) -> str | None:
    """Return why FastDecoder does not cover a PEFT model in blocks of `length` tokens, or None if it does."""
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
