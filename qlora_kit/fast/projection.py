"""Projections that share an input, with their LoRA update, in one matrix product: forward and backward.

peft computes y = base(x), clones it, applies dropout to x, and adds scale · (x̃ Aᵀ) Bᵀ in three more passes over y, the largest
tensor. Here q, k and v (also gate and up) share one product: their weights and their A are stacked, their B are block-diagonal.
Where y is wider than x, the update is part of the base product. LoRA: arXiv 2106.09685, section 4.1.

Dropout draws one random key for a tensor instead of a number for each element: a hash of an element's index and the key decides
whether the element is kept. The backward pass and gradient checkpointing hash again, so no mask is stored. Projections that share
an input share its mask.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from qlora_kit.fast.nf4 import unpack_stacked


class Lora(NamedTuple):
    """LoRA update of a group of projections: y_i += scale · (x̃ A_iᵀ) B_iᵀ for each adapted projection i."""

    A: torch.Tensor  # (k · rank, in): the A of k adapted projections, stacked
    B: tuple[torch.Tensor | None, ...]  # (out_i, rank) for each projection; None: not adapted
    sizes: tuple[int, ...]  # out_i
    scale: float  # alpha / rank
    keep: float  # 1 - dropout

    @property
    def rank(self) -> int:
        return len(self.A) // sum(B is not None for B in self.B)

    @property
    def factor(self) -> float:
        """scale / keep: `apply_dropout` does not scale up the elements that it keeps, so the update is scaled instead."""
        return self.scale / self.keep

    def scaled_A(self, dtype: torch.dtype) -> torch.Tensor:
        """Return A times `factor`, rounded to `dtype` afterwards."""
        return (self.A * self.factor).to(dtype)


def reduce_to_rank(x: torch.Tensor, lora: Lora, key: torch.Tensor) -> torch.Tensor:
    """Return xa = scale / keep · x̃ Aᵀ, (N, k · rank), of x, (N, in).

    Args:
        key: (), int32, of the dropout mask.
    """
    return apply_dropout(x, key, lora.keep) @ lora.scaled_A(x.dtype).T


def project(x: torch.Tensor, xa: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return y = x Wᵀ + xa Bᵀ + bias, (N, out) in x's dtype.

    Args:
        x: (N, in).
        xa: (N, k · rank) from `reduce_to_rank`, or None if no projection is adapted.
        weight: (out, in + width), [W | B]: stacked weights, and block-diagonal B on their right (nf4.unpack_stacked).
        bias: (out,).
    """
    if xa is None:
        return F.linear(x, weight, bias)
    fan_out, fan_in = len(weight), x.shape[1]
    if fan_out > fan_in:  # one product with [x | xa]: a copy of x costs less than a second pass over y
        xa = F.pad(xa, (0, weight.shape[1] - fan_in - xa.shape[1]))
        return F.linear(torch.cat([x, xa], 1), weight, bias)
    y = F.linear(x, weight[:, :fan_in], bias)
    return add_in_fp32(y, xa @ weight[:, fan_in : fan_in + xa.shape[1]].T)


def project_backward(
    dy: torch.Tensor, x: torch.Tensor, xa: torch.Tensor | None, weight: torch.Tensor, lora: Lora | None, key: torch.Tensor,
    gradients: Lora | None,
) -> torch.Tensor:  # fmt: skip
    """Return dx = dy W + scale / keep · (u A) ⊙ mask with u = dy B, and add to the gradients of A and B.

    gradients.A gets scale / keep · uᵀ x̃, gradients.B gets dyᵀ xa, both in the dtype of the gradients, fp32. Weight and bias are
    frozen. Shapes are those of `project`.
    """
    if xa is not None and gradients is not None:
        add_gradients_of_B(dy, xa, gradients)
    return compute_input_gradient(dy, x, weight, lora, key, gradients)


def compute_input_gradient(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, lora: Lora | None, key: torch.Tensor, gradients: Lora | None
) -> torch.Tensor:
    """Do what `project_backward` does, without the gradients of B."""
    dx = dy @ weight[:, : x.shape[1]]
    if lora is None or gradients is None:
        return dx
    u = compute_rank_gradient(dy, weight, lora)
    gradients.A.add_(u.T @ apply_dropout(x, key, lora.keep), alpha=lora.factor)
    return add_in_fp32(dx, apply_dropout(u @ lora.scaled_A(x.dtype), key, lora.keep))


def compute_rank_gradient(dy: torch.Tensor, weight: torch.Tensor, lora: Lora) -> torch.Tensor:
    """Return u = dy B, (N, k · rank), the gradient of xa."""
    fan_in, width = lora.A.shape[1], len(lora.A)
    return dy @ weight[:, fan_in : fan_in + width]


def add_gradients_of_B(dy: torch.Tensor, xa: torch.Tensor, gradients: Lora) -> None:
    """Add dyᵀ xa to the gradients of B: the diagonal blocks of that product, one for each projection."""
    blocks, column = (dy.T @ xa).split(list(gradients.sizes)), 0
    for block, gradient in zip(blocks, gradients.B, strict=True):
        if gradient is not None:
            gradient.add_(block[:, column : column + gradient.shape[1]])
            column += gradient.shape[1]


def add_in_fp32(product: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """Return the sum of two tensors, rounded once to the dtype of the first.

    torch.compile would fuse a sum in 16 bits into the matrix product, which copies `product` first.
    """
    return (upcast(product) + upcast(update)).to(product.dtype)


def upcast(x: torch.Tensor) -> torch.Tensor:
    """Convert a 16-bit tensor to fp32; return any other tensor as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def apply_dropout(x: torch.Tensor, key: torch.Tensor, keep: float) -> torch.Tensor:
    """Set a share 1 - keep of the elements of x to zero; the others are not scaled by 1 / keep (`Lora.factor`)."""
    return x if keep == 1.0 else torch.where(draw_keep_mask(x.shape, key, keep), x, 0.0)


def draw_keep_mask(shape: torch.Size, key: torch.Tensor, keep: float) -> torch.Tensor:
    """Return a mask that is True with probability `keep`, independently for each element and key, and always the same for a key.

    The hash of index and key is "lowbias32" (Wellons, Prospecting for Hash Functions, 2018).
    """
    h = torch.arange(shape.numel(), dtype=torch.int32, device=key.device)
    h ^= key
    h ^= _shift_unsigned(h, 16)
    h *= 0x7FEB352D
    h ^= _shift_unsigned(h, 15)
    h *= 0x846CA68B - 2**32
    h ^= _shift_unsigned(h, 16)
    return ((h & 0x7FFFFFFF) <= int(keep * 2**31) - 1).view(shape)


def _shift_unsigned(h: torch.Tensor, bits: int) -> torch.Tensor:
    return (h >> bits).bitwise_and_((1 << (32 - bits)) - 1)  # torch shifts copies of the sign in


def draw_keys(seed: tuple[int, ...], count: int) -> torch.Tensor:
    """Return dropout keys that depend on `seed` alone, (count,), int32, on the CPU."""
    generator = torch.Generator().manual_seed(hash(seed) & 0x7FFFFFFF)  # the hash of integers is the same in every process
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)


class LoraProjection(torch.autograd.Function):
    """`project` for autograd, one projection at a time: LoraProjection.apply(x, weight, bias, A, B, scale, keep, key).

    x and xa are kept for the backward pass, which unpacks the weight again.
    """

    @staticmethod
    def forward(ctx: Any, x, weight, bias, A, B, scale, keep, key):  # type: ignore[override]
        xa = reduce_to_rank(x, Lora(A, (B,), (len(B),), scale, keep), key)
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
