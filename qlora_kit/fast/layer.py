"""One Llama-like decoder layer, forward and backward written out, in six functions cut where matrix products end.

    h ─ norm ─ q k v ─ rotate ─ attention ─ o ─ + h ─ norm ─ gate up ─ silu(gate)·up ─ down ─ + h
        attention_input          (torch)     mlp_input               mlp_output

Written out, what is kept for the backward pass and what is computed again is a choice of the caller, and a compiler sees plain
tensor operations. h is (N, hidden) with N = batch · length; q, k, v are (batch, heads, length, head size). Frozen weights have no
gradient; gradients of the adapters are added in place.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from qlora_kit.fast.projection import Lora, project, project_backward, wide


class Part(NamedTuple):
    """A group of projections at work: q, k, v; o; gate, up; or down."""

    weight: torch.Tensor  # (out, in + width), unpacked, stacked, with B beside
    bias: torch.Tensor | None
    lora: Lora | None
    gradients: Lora | None
    key: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return project(x, self.weight, self.bias, self.lora, self.key)

    def backward(self, x: torch.Tensor, *dy: torch.Tensor) -> torch.Tensor:
        return project_backward(dy, x, self.weight, self.lora, self.key, self.gradients)


class Norms(NamedTuple):
    """Weights of a layer's RMS norms; Qwen3 has two more, over each head of q and k."""

    attention: torch.Tensor
    mlp: torch.Tensor
    q: torch.Tensor | None
    k: torch.Tensor | None
    epsilon: float


class Rotary(NamedTuple):
    """Of each position's angles, (length, head size): cos, and sin with the sign that the other half comes with (`_rotate`).

    RoFormer, arXiv 2104.09864, section 3.4.
    """

    cos: torch.Tensor
    sin: torch.Tensor


Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v or their gradients
Pair = tuple[torch.Tensor, torch.Tensor]  # gradients of gate and of up: written as two, they are read where they lie


def attention_input(
    h: torch.Tensor, batch: int, sizes: tuple[int, ...], qkv: Part, norms: Norms, rotary: Rotary
) -> tuple[Heads, torch.Tensor | None]:
    """q, k and v, rotated; and the product they were cut from where the backward pass needs it again (a norm over heads)."""
    product = qkv.apply(rms_norm(h, norms.attention, norms.epsilon))
    q, k, v = _heads(product, batch, sizes, rotary)
    v = v.contiguous()  # a view would keep all of `product` alive
    if norms.q is None or norms.k is None:
        return (_rotate(q, rotary), _rotate(k, rotary), v), None
    q, k = rms_norm(q, norms.q, norms.epsilon), rms_norm(k, norms.k, norms.epsilon)
    return (_rotate(q, rotary), _rotate(k, rotary), v), product


def attention_input_backward(
    dh: torch.Tensor,
    gradients: Heads,
    h: torch.Tensor,
    product: torch.Tensor | None,
    sizes: tuple[int, ...],
    qkv: Part,
    norms: Norms,
    rotary: Rotary,
) -> torch.Tensor:
    dq, dk, dv = _unrotate(gradients[0], rotary), _unrotate(gradients[1], rotary), gradients[2]
    if product is not None and norms.q is not None and norms.k is not None:
        q, k, _ = _heads(product, len(dq), sizes, rotary)
        dq, dk = rms_norm_backward(dq, q, norms.q, norms.epsilon), rms_norm_backward(dk, k, norms.k, norms.epsilon)
    dproduct = torch.cat([part.transpose(1, 2).reshape(len(h), -1) for part in (dq, dk, dv)], 1)
    dx = qkv.backward(rms_norm(h, norms.attention, norms.epsilon), dproduct)
    return dh + rms_norm_backward(dx, h, norms.attention, norms.epsilon)


def mlp_input(h: torch.Tensor, attended: torch.Tensor, o: Part, gate_up: Part, norms: Norms) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual after attention, (N, hidden), and gate and up side by side, (N, 2 · mlp), of `attended` shaped as q."""
    middle = h + o.apply(_flat(attended))
    return middle, gate_up.apply(rms_norm(middle, norms.mlp, norms.epsilon))


def mlp_input_backward(
    dh: torch.Tensor, dgate_up: Pair, middle: torch.Tensor, attended: torch.Tensor, o: Part, gate_up: Part, norms: Norms
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the layer's input along the residual path, and of `attended`."""
    dx = gate_up.backward(rms_norm(middle, norms.mlp, norms.epsilon), *dgate_up)
    dmiddle = dh + rms_norm_backward(dx, middle, norms.mlp, norms.epsilon)
    dattended = o.backward(_flat(attended), dmiddle)
    batch, heads, length, size = attended.shape
    return dmiddle, dattended.view(batch, length, heads, size).transpose(1, 2)


def mlp_output(middle: torch.Tensor, gate_up: torch.Tensor, down: Part) -> torch.Tensor:
    gate, up = gate_up.chunk(2, 1)
    return middle + down.apply(F.silu(gate) * up)


def mlp_output_backward(dh: torch.Tensor, gate_up: torch.Tensor, down: Part) -> Pair:
    """Gradients of gate and up. With σ = sigmoid(g): d(g σ u) = (u σ (1 + g (1 - σ)), g σ)."""
    gate, up = gate_up.chunk(2, 1)
    d = down.backward(F.silu(gate) * up, dh)
    g, sigmoid = wide(gate), torch.sigmoid(wide(gate))
    dgate = wide(d) * wide(up) * sigmoid * (1 + g * (1 - sigmoid))
    return dgate.to(d.dtype), (wide(d) * g * sigmoid).to(d.dtype)


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


def _rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), halves of each head."""
    return x * rotary.cos + _swap_halves(x) * rotary.sin


def _unrotate(dy: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """The transpose of `_rotate`."""
    return dy * rotary.cos + _swap_halves(dy * rotary.sin)


def _swap_halves(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
