"""A 4-bit projection with its LoRA update as one autograd function.

peft computes y = base(x), clones it, drops out x, and adds scale · (x̃ Aᵀ) Bᵀ in three more passes over y, the largest tensor.
Here the update is added into the base product (addmm), the unpacked weight lives only inside the function, and what is kept for
the backward pass is x, x̃ Aᵀ and one byte of dropout mask an element. LoRA: arXiv 2106.09685, section 4.1.

The modules stay peft's, under a subclass that overrides `forward`: what is saved is the same PEFT adapter.
"""

from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes import functional as bnb
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import LoraLayer


class LoraProjection(torch.autograd.Function):
    """y = x Wᵀ + bias + s · (x̃ Aᵀ) Bᵀ with x̃ = x ⊙ mask and s = scale / keep; W in 4 bits and frozen.

    Shapes: x (N, in), mask (N, in) or None, bias (out,) or None, A (rank, in), B (out, rank) -> y (N, out), in x's dtype.
    With u = s · dy B: dx = dy W + (u A) ⊙ mask, dA = uᵀ x̃, dB = s · dyᵀ (x̃ Aᵀ).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale, mask, keep):  # type: ignore[override]
        xa = _masked(x, mask) @ A.to(x.dtype).T  # (N, rank)
        y = F.linear(x, _unpack(weight, x.dtype), bias)
        y.addmm_(xa, B.to(x.dtype).T, alpha=scale / keep)  # 1 / keep here spares a pass over x
        ctx.save_for_backward(x, xa, A, B, mask)
        ctx.weight, ctx.scale = weight, scale / keep
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        x, xa, A, B, mask = ctx.saved_tensors
        u = (dy @ B.to(dy.dtype)).mul_(ctx.scale)  # (N, rank)
        dB = (dy.T @ xa).to(B.dtype).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        dA = (u.T @ _masked(x, mask)).to(A.dtype) if ctx.needs_input_grad[3] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ _unpack(ctx.weight, dy.dtype)
            if mask is None:
                dx.addmm_(u, A.to(dy.dtype))
            else:
                dx.add_(_masked(u @ A.to(dy.dtype), mask))
        return dx, None, None, dA, dB, None, None, None


def _masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return x if mask is None else torch.where(mask, x, 0.0)


def _unpack(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    """The (out, in) weight in `dtype`; a plain tensor, as in tests, is taken as it is."""
    state = getattr(weight, "quant_state", None)
    return weight if state is None else bnb.dequantize_4bit(weight.data, state).to(dtype)


class FusedLinear4bit(Linear4bit):
    """peft's 4-bit LoRA layer with the fused function while it trains; in every other state it is peft's own.

    dropout_source: where masks come from; None is torch's global generator.
    """

    dropout_source: Any = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.training or self.disable_adapters or self.merged or kwargs:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        base: Any = self.base_layer
        flat = x.reshape(-1, x.shape[-1]).to(base.compute_dtype)  # (N, in)
        probability = getattr(self.lora_dropout[name], "p", 0.0)
        mask = None
        if probability:
            generator = self.dropout_source.generator() if self.dropout_source else None
            mask = torch.empty_like(flat, dtype=torch.bool).bernoulli_(1 - probability, generator=generator)
        bias = None if base.bias is None else base.bias.to(flat.dtype)
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        with torch.autocast(x.device.type, enabled=False):  # the dtypes are chosen here
            y: torch.Tensor = LoraProjection.apply(flat, base.weight, bias, A, B, self.scaling[name], mask, 1 - probability)
        return y.view(*x.shape[:-1], -1)


def count_lora_layers(model: torch.nn.Module) -> int:
    return sum(isinstance(module, LoraLayer) for module in model.modules())


def fuse(model: torch.nn.Module) -> int:
    """Put every plain 4-bit LoRA layer of `model` under FusedLinear4bit and return how many there are.

    Left as they are: layers with a variant such as DoRA, with a LoRA bias, or with several adapters.
    """
    count = 0
    for module in model.modules():
        if (
            type(module) is Linear4bit
            and not module.lora_variant
            and len(module.lora_A) == 1
            and not any(module.lora_bias.values())
        ):
            module.__class__ = FusedLinear4bit
            count += 1
    return count
