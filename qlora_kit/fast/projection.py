"""Projections that share an input, with their LoRA update: forward and backward written out.

peft computes y = base(x), clones it, drops out x, and adds scale · (x̃ Aᵀ) Bᵀ in three more passes over y, the largest tensor.
Here q, k and v (gate and up as well) share their products, weights and A stacked, B block-diagonal, and the update rides along in
the base product where y is large. LoRA: arXiv 2106.09685, section 4.1.

Dropout draws one random key, not a number an element: each is kept or not by a hash of its index and the key. The backward pass
and a recomputation hash again instead of storing a mask. One mask serves the projections that share an input.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from qlora_kit.fast.nf4 import unpack_stacked


class Lora(NamedTuple):
    """The update of a group of projections: y_i += scale · (x̃ A_iᵀ) B_iᵀ for each of them that has one."""

    A: torch.Tensor  # (k · rank, in): the A of k adapted projections, one below the other
    B: tuple[torch.Tensor | None, ...]  # (out_i, rank) for each projection; None: not adapted
    sizes: tuple[int, ...]  # out_i
    scale: float  # alpha / rank
    keep: float  # 1 - dropout

    @property
    def rank(self) -> int:
        return len(self.A) // sum(B is not None for B in self.B)

    @property
    def factor(self) -> float:
        """Of the update; dropout leaves the elements that it keeps as they are."""
        return self.scale / self.keep

    def scaled_A(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.A * self.factor).to(dtype)


def reduced(x: torch.Tensor, lora: Lora, key: torch.Tensor) -> torch.Tensor:
    """xa = scale / keep · x̃ Aᵀ, (N, k · rank) of x (N, in); key: () int32, of the dropout mask."""
    return dropped(x, key, lora.keep) @ lora.scaled_A(x.dtype).T


def project(x: torch.Tensor, xa: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y = x Wᵀ + xa Bᵀ + bias.

    Args:
        x: (N, in).
        xa: (N, k · rank) from `reduced`, or None where nothing is adapted.
        weight: (out, in + width), stacked weights with each B_i to their right: [W | B] (nf4.unpack_stacked).
        bias: (out,).

    Returns:
        (N, out) in x's dtype.
    """
    if xa is None:
        return F.linear(x, weight, bias)
    fan_out, fan_in = len(weight), x.shape[1]
    if fan_out > fan_in:  # one product with [x | xa]: a copy of x costs less than a second pass over y
        xa = F.pad(xa, (0, weight.shape[1] - fan_in - xa.shape[1]))
        return F.linear(torch.cat([x, xa], 1), weight, bias)
    y = F.linear(x, weight[:, :fan_in], bias)
    return add(y, xa @ weight[:, fan_in : fan_in + xa.shape[1]].T)


def project_backward(
    dy: torch.Tensor, x: torch.Tensor, xa: torch.Tensor | None, weight: torch.Tensor, lora: Lora | None, key: torch.Tensor,
    gradients: Lora | None,
) -> torch.Tensor:  # fmt: skip
    """dx = dy W + scale / keep · (u A) ⊙ mask with u = dy B; adds scale / keep · uᵀ x̃ to gradients.A and dyᵀ xa to gradients.B.

    Shapes as in `project`. The weight and its bias are frozen. The gradients keep their own dtype, fp32.
    """
    if xa is not None and gradients is not None:
        add_gradients_of_B(dy, xa, gradients)
    return input_gradient(dy, x, weight, lora, key, gradients)


def input_gradient(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, lora: Lora | None, key: torch.Tensor, gradients: Lora | None
) -> torch.Tensor:
    """`project_backward` without the gradients of B."""
    dx = dy @ weight[:, : x.shape[1]]
    if lora is None or gradients is None:
        return dx
    u = gradient_of_xa(dy, weight, lora)
    gradients.A.add_(u.T @ dropped(x, key, lora.keep), alpha=lora.factor)
    return add(dx, dropped(u @ lora.scaled_A(x.dtype), key, lora.keep))


def gradient_of_xa(dy: torch.Tensor, weight: torch.Tensor, lora: Lora) -> torch.Tensor:
    """u = dy B, (N, k · rank)."""
    fan_in, width = lora.A.shape[1], len(lora.A)
    return dy @ weight[:, fan_in : fan_in + width]


def add_gradients_of_B(dy: torch.Tensor, xa: torch.Tensor, gradients: Lora) -> None:
    """dyᵀ xa, of which each projection has its own rows and columns."""
    blocks, column = (dy.T @ xa).split(list(gradients.sizes)), 0
    for block, gradient in zip(blocks, gradients.B, strict=True):
        if gradient is not None:
            gradient.add_(block[:, column : column + gradient.shape[1]])
            column += gradient.shape[1]


def add(product: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """Their sum, rounded once; in fp32 also because torch.compile would else make it part of the product, with a copy before."""
    return (wide(product) + wide(update)).to(product.dtype)


def wide(x: torch.Tensor) -> torch.Tensor:
    """fp32 for what comes in 16 bits."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def dropped(x: torch.Tensor, key: torch.Tensor, keep: float) -> torch.Tensor:
    """x with a share of 1 - keep of its elements zero; not scaled up by 1 / keep, which the callers fold into `scale`."""
    return x if keep == 1.0 else torch.where(keep_mask(x.shape, key, keep), x, 0.0)


def keep_mask(shape: torch.Size, key: torch.Tensor, keep: float) -> torch.Tensor:
    """True with probability `keep`, independently for each element and each key; the same again for the same key.

    The hash is "lowbias32" (Wellons, Prospecting for Hash Functions, 2018) of the element's index and the key.
    """
    h = torch.arange(shape.numel(), dtype=torch.int32, device=key.device)
    h ^= key
    h ^= _shift(h, 16)
    h *= 0x7FEB352D
    h ^= _shift(h, 15)
    h *= 0x846CA68B - 2**32
    h ^= _shift(h, 16)
    return ((h & 0x7FFFFFFF) <= int(keep * 2**31) - 1).view(shape)


def _shift(h: torch.Tensor, bits: int) -> torch.Tensor:
    return (h >> bits).bitwise_and_((1 << (32 - bits)) - 1)  # of an unsigned number


def draw_keys(seed: tuple[int, ...], count: int) -> torch.Tensor:
    """(count,) int32 on the CPU: dropout keys that follow from `seed` alone; Python's hash of integers is the same everywhere."""
    generator = torch.Generator().manual_seed(hash(seed) & 0x7FFFFFFF)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)


class LoraProjection(torch.autograd.Function):
    """`project` for autograd, one projection at a time: LoraProjection.apply(x, weight, bias, A, B, scale, keep, key).

    What is kept for the backward pass is x and xa; the weight is unpacked again.
    """

    @staticmethod
    def forward(ctx: Any, x, weight, bias, A, B, scale, keep, key):  # type: ignore[override]
        xa = reduced(x, Lora(A, (B,), (len(B),), scale, keep), key)
        ctx.save_for_backward(x, xa, A, B, key)
        ctx.weight, ctx.scale, ctx.keep = weight, scale, keep
        return project(x, xa, unpack_stacked((weight,), (B,), len(A), x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[override]
        x, xa, A, B, key = ctx.saved_tensors
        lora = Lora(A, (B,), (len(B),), ctx.scale, ctx.keep)
        gradients = lora._replace(A=torch.zeros_like(A), B=(torch.zeros_like(B),))
        dx = project_backward(dy, x, xa, unpack_stacked((ctx.weight,), (B,), len(A), x.dtype), lora, key, gradients)
        return dx, None, None, gradients.A, gradients.B[0], None, None, None
