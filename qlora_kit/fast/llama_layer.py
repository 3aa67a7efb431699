"""One Llama-like decoder layer, forward and backward written out, in steps between which other kernels run.

    h ─ norm ─ q k v ─ rotate ─ attention ─ o ─ + h ─ norm ─ gate up ─ silu(gate)·up ─ down ─ + h
        attention_input       (attention.py)  mlp_input           (mlp_activation.py)  mlp_output

Because the backward pass is written out, the caller decides what is kept for it and what is recomputed, and torch.compile sees
plain tensor operations.

Shapes: h is (N, hidden) with N = batch · length; q, k and v are (batch, heads, length, head size); xa is (N, k · rank), the input
of a group of projections times their stacked A (projection.py), or None if none of them is adapted. Frozen weights get no
gradient; gradients of the LoRA matrices are added in place.
"""

from typing import NamedTuple

import torch

from qlora_kit.fast.projection import (
    Lora,
    add_gradients_of_B,
    compute_input_gradient,
    compute_rank_gradient,
    project,
    project_backward,
    reduce_to_rank,
    upcast,
)


class UnpackedGroup(NamedTuple):
    """Projections that share an input (q, k, v; o; gate, up; or down), with their weights unpacked."""

    weight: torch.Tensor  # (out, in + width), [W | B] (nf4.unpack_stacked)
    bias: torch.Tensor | None  # (out,)
    lora: Lora | None
    gradients: Lora | None
    key: torch.Tensor  # (), int32, of the dropout mask

    def apply(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the product with x, (N, out), and xa."""
        xa = None if self.lora is None else reduce_to_rank(x, self.lora, self.key)
        return project(x, xa, self.weight, self.bias), xa

    def backward(self, dy: torch.Tensor, x: torch.Tensor, xa: torch.Tensor | None) -> torch.Tensor:
        """Return the gradient of x, and add to the gradients of A and B."""
        return project_backward(dy, x, xa, self.weight, self.lora, self.key, self.gradients)


class Norms(NamedTuple):
    """Weights of a layer's RMS norms; Qwen3 has two more, over each head of q and k."""

    attention: torch.Tensor
    mlp: torch.Tensor
    q: torch.Tensor | None
    k: torch.Tensor | None
    epsilon: float


class Rotary(NamedTuple):
    """cos and sin of each position's angles, (length, head size), or (batch, 1, length, head size) if rows differ in positions.

    sin has the sign that `rotate` needs. RoFormer, arXiv 2104.09864, section 3.4.
    """

    cos: torch.Tensor
    sin: torch.Tensor


Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v or their gradients


def attention_input(
    h: torch.Tensor, batch: int, sizes: tuple[int, ...], qkv: UnpackedGroup, norms: Norms, rotary: Rotary
) -> tuple[Heads, torch.Tensor | None, torch.Tensor | None]:
    """Return q, k and v, rotated; xa; and, where the backward pass needs it (Qwen3's norms over heads), their common product."""
    product, xa = qkv.apply(rms_norm(h, norms.attention, norms.epsilon))
    q, k, v = _split_heads(product, batch, sizes, rotary)
    if norms.q is not None and norms.k is not None:
        q, k = rms_norm(q, norms.q, norms.epsilon), rms_norm(k, norms.k, norms.epsilon)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)  # a view of `product` would keep all of it alive
    heads = rotate(q, rotary), rotate(k, rotary), v
    return heads, xa, product if norms.q is not None else None


def heads_backward(
    gradients: Heads, product: torch.Tensor | None, sizes: tuple[int, ...], norms: Norms, rotary: Rotary
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of the q, k and v columns of `product`, (N, size) each.

    The caller concatenates them: inside a compiled function that takes five times as long.
    """
    dq, dk, dv = _unrotate(gradients[0], rotary), _unrotate(gradients[1], rotary), gradients[2]
    if product is not None and norms.q is not None and norms.k is not None:
        q, k, _ = _split_heads(product, len(dq), sizes, rotary)
        dq, dk = rms_norm_backward(dq, q, norms.q, norms.epsilon), rms_norm_backward(dk, k, norms.k, norms.epsilon)
    return tuple(_join_heads(gradient) for gradient in (dq, dk, dv))


def attention_input_backward(
    dh: torch.Tensor, dproduct: torch.Tensor, h: torch.Tensor, xa: torch.Tensor | None, qkv: UnpackedGroup, norms: Norms
) -> torch.Tensor:
    """Return the gradient of h: `dh`, which came along the residual path, plus that through q, k and v."""
    dx = qkv.backward(dproduct, rms_norm(h, norms.attention, norms.epsilon), xa)
    return dh + rms_norm_backward(dx, h, norms.attention, norms.epsilon)


def mlp_input(
    h: torch.Tensor, attended: torch.Tensor, o: UnpackedGroup, gate_up: UnpackedGroup, norms: Norms
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the residual after attention, (N, hidden); gate and up side by side, (N, 2 · mlp); xa of o; xa of gate and up."""
    product, o_xa = o.apply(_join_heads(attended))
    middle = h + product
    gates, gate_up_xa = gate_up.apply(rms_norm(middle, norms.mlp, norms.epsilon))
    return middle, gates, o_xa, gate_up_xa


def mlp_input_backward(
    dh: torch.Tensor, dgates: torch.Tensor, middle: torch.Tensor, attended: torch.Tensor, o_xa: torch.Tensor | None,
    o: UnpackedGroup, gate_up: UnpackedGroup, norms: Norms,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of h along the residual path and of `attended`.

    The gradients of gate's and up's B were added before, by mlp_activation.add_sums.
    """
    x = rms_norm(middle, norms.mlp, norms.epsilon)
    dx = compute_input_gradient(dgates, x, gate_up.weight, gate_up.lora, gate_up.key, gate_up.gradients)
    dmiddle = dh + rms_norm_backward(dx, middle, norms.mlp, norms.epsilon)
    dattended = o.backward(dmiddle, _join_heads(attended), o_xa)
    batch, heads, length, size = attended.shape
    return dmiddle, dattended.view(batch, length, heads, size).transpose(1, 2)


def mlp_output(
    middle: torch.Tensor, y: torch.Tensor, partial_sums: torch.Tensor | None, down: UnpackedGroup
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the layer's output, (N, hidden), and xa of `down`.

    Args:
        y, partial_sums: from mlp_activation.activate.
    """
    xa = None if partial_sums is None or down.lora is None else partial_sums.sum(0).to(y.dtype)
    return middle + project(y, xa, down.weight, down.bias), xa


def mlp_output_backward(
    dh: torch.Tensor, xa: torch.Tensor | None, down: UnpackedGroup
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of y through the frozen weight, (N, mlp), and of xa, and add to those of B.

    The gradient of A is added where y is at hand, by mlp_activation.activate_backward.
    """
    u = None
    if xa is not None and down.lora is not None and down.gradients is not None:
        add_gradients_of_B(dh, xa, down.gradients)
        u = compute_rank_gradient(dh, down.weight, down.lora)
    fan_in = down.weight.shape[1] if down.lora is None else down.lora.A.shape[1]
    return dh @ down.weight[:, :fan_in], u


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return x / sqrt(mean x² + epsilon) · weight over the last dimension, rounded where transformers rounds.

    RMSNorm, arXiv 1910.07467.
    """
    full = upcast(x)
    return weight * (full * torch.rsqrt(full.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def rms_norm_backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return dx = r (g - x̂ mean(g x̂)) with x̂ = x r, r = 1 / sqrt(mean x² + epsilon) and g = dy · weight."""
    full, g = upcast(x), upcast(dy) * weight
    r = torch.rsqrt(full.square().mean(-1, keepdim=True) + epsilon)
    normal = full * r
    return (r * (g - normal * (g * normal).mean(-1, keepdim=True))).to(x.dtype)


def _split_heads(product: torch.Tensor, batch: int, sizes: tuple[int, ...], rotary: Rotary) -> list[torch.Tensor]:
    size = rotary.cos.shape[-1]
    return [piece.view(batch, len(product) // batch, -1, size).transpose(1, 2) for piece in product.split(list(sizes), 1)]


def _join_heads(heads: torch.Tensor) -> torch.Tensor:
    """(batch, heads, length, size) -> (N, heads · size)."""
    return heads.transpose(1, 2).reshape(heads.shape[0] * heads.shape[2], -1)


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Return (x1 cos - x2 sin, x2 cos + x1 sin) of the two halves x1 and x2 of each head."""
    return x * rotary.cos + _swap_halves(x) * rotary.sin


def _unrotate(dy: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Apply the transpose of `rotate`."""
    return dy * rotary.cos + _swap_halves(dy * rotary.sin)


def _swap_halves(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
