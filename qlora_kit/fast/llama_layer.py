"""One Llama-like decoder layer, forward and backward written out, in steps cut where a kernel of its own stands between them.

    h ─ norm ─ q k v ─ rotate ─ attention ─ o ─ + h ─ norm ─ gate up ─ silu(gate)·up ─ down ─ + h
        attention_input          (torch)     mlp_input               (activation.py)  mlp_output

Written out, what is kept for the backward pass and what is computed again is a choice of the caller, and a compiler sees plain
tensor operations. h is (N, hidden) with N = batch · length; q, k, v are (batch, heads, length, head size); xa is what a group of
projections made of its input by A, (N, k · rank), None where none is adapted. Frozen weights have no gradient; gradients of the
adapters are added in place.
"""

from typing import NamedTuple

import torch

from qlora_kit.fast.projection import (
    Lora,
    add_gradients_of_B,
    gradient_of_xa,
    input_gradient,
    project,
    project_backward,
    reduced,
    wide,
)


class Part(NamedTuple):
    """A group of projections at work: q, k, v; o; gate, up; or down."""

    weight: torch.Tensor  # (out, in + width), unpacked, stacked, with B beside
    bias: torch.Tensor | None
    lora: Lora | None
    gradients: Lora | None
    key: torch.Tensor

    def apply(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The product and xa."""
        xa = None if self.lora is None else reduced(x, self.lora, self.key)
        return project(x, xa, self.weight, self.bias), xa

    def backward(self, dy: torch.Tensor, x: torch.Tensor, xa: torch.Tensor | None) -> torch.Tensor:
        return project_backward(dy, x, xa, self.weight, self.lora, self.key, self.gradients)


class Norms(NamedTuple):
    """Weights of a layer's RMS norms; Qwen3 has two more, over each head of q and k."""

    attention: torch.Tensor
    mlp: torch.Tensor
    q: torch.Tensor | None
    k: torch.Tensor | None
    epsilon: float


class Rotary(NamedTuple):
    """Of each position's angles: cos, and sin with the sign that the other half comes with (`rotate`).

    (length, head size), or (batch, 1, length, head size) where rows have positions of their own.

    RoFormer, arXiv 2104.09864, section 3.4.
    """

    cos: torch.Tensor
    sin: torch.Tensor


Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v or their gradients
Reduced = torch.Tensor | None  # xa


def attention_input(
    h: torch.Tensor, batch: int, sizes: tuple[int, ...], qkv: Part, norms: Norms, rotary: Rotary
) -> tuple[Heads, Reduced, torch.Tensor | None]:
    """q, k and v, rotated; xa; and the product they were cut from where the backward pass needs it (a norm over heads)."""
    product, xa = qkv.apply(rms_norm(h, norms.attention, norms.epsilon))
    q, k, v = _heads(product, batch, sizes, rotary)
    v = v.contiguous()  # a view would keep all of `product` alive
    if norms.q is None or norms.k is None:
        return (rotate(q, rotary), rotate(k, rotary), v), xa, None
    q, k = rms_norm(q, norms.q, norms.epsilon), rms_norm(k, norms.k, norms.epsilon)
    return (rotate(q, rotary), rotate(k, rotary), v), xa, product


def heads_backward(
    gradients: Heads, product: torch.Tensor | None, sizes: tuple[int, ...], norms: Norms, rotary: Rotary
) -> tuple[torch.Tensor, ...]:
    """Gradients of the three pieces of `product`, (N, size) each. To be joined outside: compiled, that is five times as slow."""
    dq, dk, dv = _unrotate(gradients[0], rotary), _unrotate(gradients[1], rotary), gradients[2]
    if product is not None and norms.q is not None and norms.k is not None:
        q, k, _ = _heads(product, len(dq), sizes, rotary)
        dq, dk = rms_norm_backward(dq, q, norms.q, norms.epsilon), rms_norm_backward(dk, k, norms.k, norms.epsilon)
    return tuple(_flat(part) for part in (dq, dk, dv))


def attention_input_backward(
    dh: torch.Tensor, dproduct: torch.Tensor, h: torch.Tensor, xa: Reduced, qkv: Part, norms: Norms
) -> torch.Tensor:
    dx = qkv.backward(dproduct, rms_norm(h, norms.attention, norms.epsilon), xa)
    return dh + rms_norm_backward(dx, h, norms.attention, norms.epsilon)


def mlp_input(
    h: torch.Tensor, attended: torch.Tensor, o: Part, gate_up: Part, norms: Norms
) -> tuple[torch.Tensor, torch.Tensor, Reduced, Reduced]:
    """The residual after attention, (N, hidden); gate and up side by side, (N, 2 · mlp); xa of o and of gate and up."""
    product, o_xa = o.apply(_flat(attended))
    middle = h + product
    gates, gate_up_xa = gate_up.apply(rms_norm(middle, norms.mlp, norms.epsilon))
    return middle, gates, o_xa, gate_up_xa


def mlp_input_backward(
    dh: torch.Tensor,
    dgates: torch.Tensor,
    middle: torch.Tensor,
    attended: torch.Tensor,
    o_xa: Reduced,
    o: Part,
    gate_up: Part,
    norms: Norms,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the layer's input along the residual path, and of `attended`; gate's and up's B got theirs before."""
    x = rms_norm(middle, norms.mlp, norms.epsilon)
    dx = input_gradient(dgates, x, gate_up.weight, gate_up.lora, gate_up.key, gate_up.gradients)
    dmiddle = dh + rms_norm_backward(dx, middle, norms.mlp, norms.epsilon)
    dattended = o.backward(dmiddle, _flat(attended), o_xa)
    batch, heads, length, size = attended.shape
    return dmiddle, dattended.view(batch, length, heads, size).transpose(1, 2)


def mlp_output(middle: torch.Tensor, y: torch.Tensor, parts: torch.Tensor | None, down: Part) -> tuple[torch.Tensor, Reduced]:
    """The layer's output and xa of `down`, of activation.activate's y and parts of a sum."""
    xa = None
    if parts is not None and down.lora is not None:
        xa = parts.sum(0).to(y.dtype)
    return middle + project(y, xa, down.weight, down.bias), xa


def mlp_output_backward(dh: torch.Tensor, xa: Reduced, down: Part) -> tuple[torch.Tensor, Reduced]:
    """What comes to y through the frozen weight, (N, mlp), and to xa; the gradient of A is added where y is at hand."""
    u = None
    if xa is not None and down.lora is not None and down.gradients is not None:
        add_gradients_of_B(dh, xa, down.gradients)
        u = gradient_of_xa(dh, down.weight, down.lora)
    fan_in = down.weight.shape[1] if down.lora is None else down.lora.A.shape[1]
    return dh @ down.weight[:, :fan_in], u


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean x² + epsilon) · weight over the last dimension, rounded where transformers rounds. arXiv 1910.07467."""
    full = wide(x)
    return weight * (full * torch.rsqrt(full.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def rms_norm_backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """With x̂ = x r, r = 1 / rms and g = dy · weight: dx = r (g - x̂ mean(g x̂))."""
    full, g = wide(x), wide(dy) * weight
    r = torch.rsqrt(full.square().mean(-1, keepdim=True) + epsilon)
    normal = full * r
    return (r * (g - normal * (g * normal).mean(-1, keepdim=True))).to(x.dtype)


def _heads(product: torch.Tensor, batch: int, sizes: tuple[int, ...], rotary: Rotary) -> list[torch.Tensor]:
    size = rotary.cos.shape[-1]
    return [part.view(batch, len(product) // batch, -1, size).transpose(1, 2) for part in product.split(list(sizes), 1)]


def _flat(attended: torch.Tensor) -> torch.Tensor:
    return attended.transpose(1, 2).reshape(attended.shape[0] * attended.shape[2], -1)


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), halves of each head."""
    return x * rotary.cos + _swap_halves(x) * rotary.sin


def _unrotate(dy: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """The transpose of `rotate`."""
    return dy * rotary.cos + _swap_halves(dy * rotary.sin)


def _swap_halves(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
