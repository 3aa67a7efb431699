"""Projections that share an input, with their LoRA update: forward and backward written out.

peft computes y = base(x), clones it, drops out x, and adds scale · (x̃ Aᵀ) Bᵀ in three more passes over y, the largest tensor.
Here LoRA is a few more columns: y = [x | x̃ Aᵀ] [W | B]ᵀ, one product, and q, k and v (gate and up as well) share it, their
weights and their A stacked, B block-diagonal. LoRA: arXiv 2106.09685, section 4.1.

Dropout draws no random numbers: an element is kept or not by a hash of its index and of a key. The backward pass and a
recomputation hash again instead of storing a mask. One mask serves the projections that share an input.
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


def project(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora: Lora | None, key: torch.Tensor
) -> torch.Tensor:
    """y = [x | xa] [W | B]ᵀ + bias with xa = scale / keep · x̃ Aᵀ: base product and update in one.

    Args:
        x: (N, in).
        weight: (out, in + width), stacked weights with each B_i to their right (nf4.unpack_stacked).
        bias: (out,).
        key: () int32, of the dropout mask.

    Returns:
        (N, out) in x's dtype.
    """
    if lora is None:
        return F.linear(x, weight, bias)
    xa = _reduced(dropped(x, key, lora.keep), lora)
    xa = F.pad(xa, (0, weight.shape[1] - x.shape[1] - xa.shape[1]))
    return F.linear(torch.cat([x, xa], 1), weight, bias)


def project_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, lora: Lora | None, key: torch.Tensor, gradients: Lora | None
) -> torch.Tensor:
    """dx = dy W + (u A) ⊙ mask with u = scale / keep · dy B; adds uᵀ x̃ to gradients.A and dyᵀ xa to gradients.B.

    Shapes as in `project`; the weight and its bias are frozen. The gradients keep their own dtype, fp32.
    """
    if lora is None or gradients is None:
        return dy @ weight
    W, B = weight[:, : x.shape[1]], weight[:, x.shape[1] : x.shape[1] + len(lora.A)]
    kept = dropped(x, key, lora.keep)  # (N, in)
    u = (dy @ B) * (lora.scale / lora.keep)  # (N, k · rank)
    gradients.A.add_(u.T @ kept)
    dB = dy.T @ _reduced(kept, lora)  # (out, k · rank), of which the blocks on the diagonal count
    row = column = 0
    for size, gradient in zip(lora.sizes, gradients.B, strict=True):
        if gradient is not None:
            gradient.add_(dB[row : row + size, column : column + gradient.shape[1]])
            column += gradient.shape[1]
        row += size
    return dy @ W + dropped(u @ lora.A.to(x.dtype), key, lora.keep)


def _reduced(kept: torch.Tensor, lora: Lora) -> torch.Tensor:
    """xa (N, k · rank) of x̃."""
    return (kept @ lora.A.to(kept.dtype).T) * (lora.scale / lora.keep)


def dropped(x: torch.Tensor, key: torch.Tensor, keep: float) -> torch.Tensor:
    """x with a share of 1 - keep of its elements zero; not scaled up by 1 / keep, which the callers fold into `scale`."""
    return x if keep == 1.0 else torch.where(keep_mask(x.shape, key, keep), x, 0.0)


def keep_mask(shape: torch.Size, key: torch.Tensor, keep: float) -> torch.Tensor:
    """True with probability `keep`, independently for each element and each key; the same again for the same key.

    A multiply-xorshift hash of 32 bits (constants of MurmurHash3's finalizer) over the element's index, the key mixed in
    between its rounds, so that no key's sequence is another's shifted.
    """
    h = torch.arange(shape.numel(), dtype=torch.int32, device=key.device)
    for bits, factor in ((15, -1640531535), (15, -2048144789)):
        h ^= _shift(h, bits)
        h *= factor
    h ^= key
    for bits, factor in ((16, -2048144789), (13, -1028477387)):
        h ^= _shift(h, bits)
        h *= factor
    h ^= _shift(h, 16)
    return ((h & 0x7FFFFFFF) <= int(keep * 2**31) - 1).view(shape)


def _shift(h: torch.Tensor, bits: int) -> torch.Tensor:
    return (h >> bits).bitwise_and_((1 << (32 - bits)) - 1)  # of an unsigned number


def draw_keys(seed: tuple[int, ...], count: int) -> torch.Tensor:
    """(count,) int32 on the CPU: dropout keys that follow from `seed` alone."""
    generator = torch.Generator().manual_seed(hash(seed) & 0x7FFFFFFF)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)


class LoraProjection(torch.autograd.Function):
    """`project` for autograd, one projection at a time: LoraProjection.apply(x, weight, bias, A, B, scale, keep, key).

    What is kept for the backward pass is x; the weight is unpacked again.
    """

    @staticmethod
    def forward(ctx: Any, x, weight, bias, A, B, scale, keep, key):  # type: ignore[override]
        ctx.save_for_backward(x, A, B, key)
        ctx.weight, ctx.scale, ctx.keep = weight, scale, keep
        return project(x, unpack_stacked((weight,), (B,), len(A), x.dtype), bias, Lora(A, (B,), (len(B),), scale, keep), key)

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[override]
        x, A, B, key = ctx.saved_tensors
        lora = Lora(A, (B,), (len(B),), ctx.scale, ctx.keep)
        gradients = lora._replace(A=torch.zeros_like(A), B=(torch.zeros_like(B),))
        dx = project_backward(dy, x, unpack_stacked((ctx.weight,), (B,), len(A), x.dtype), lora, key, gradients)
        return dx, None, None, gradients.A, gradients.B[0], None, None, None
