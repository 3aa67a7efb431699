"""peft's 4-bit LoRA layers with the fused projection, for architectures that training_pass.py does not cover.

The modules stay peft's, under a subclass that overrides `forward`, so the saved adapter is the same.
"""

from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import LoraLayer

from qlora_kit.fast.projection import LoraProjection


class FusedLinear4bit(Linear4bit):
    """peft's 4-bit LoRA layer, which computes by LoraProjection in training and by peft's own code otherwise."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.training or self.disable_adapters or self.merged or kwargs:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        base: Any = self.base_layer
        flat = x.reshape(-1, x.shape[-1]).to(base.compute_dtype)  # (N, in)
        keep = 1.0 - getattr(self.lora_dropout[name], "p", 0.0)
        # From the global generator, whose state gradient checkpointing restores before it recomputes.
        key = torch.randint(-(2**31), 2**31, (), device=x.device).to(torch.int32)
        bias = None if base.bias is None else base.bias.to(flat.dtype)
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        with torch.autocast(x.device.type, enabled=False):  # LoraProjection chooses the dtypes itself
            y: torch.Tensor = LoraProjection.apply(flat, base.weight, bias, A, B, self.scaling[name], keep, key)
        return y.view(*x.shape[:-1], -1)


def is_plain(layer: LoraLayer) -> bool:
    """Return whether a LoRA layer is y = base(x) + scale · (x Aᵀ) Bᵀ: no variant such as DoRA, no LoRA bias, one adapter."""
    return not layer.lora_variant and len(layer.lora_A) == 1 and not any(layer.lora_bias.values())


def fuse(model: torch.nn.Module) -> int:
    """Turn every plain 4-bit LoRA layer of a model into a FusedLinear4bit, and return their number."""
    layers = [module for module in model.modules() if type(module) is Linear4bit and is_plain(module)]
    for layer in layers:
        layer.__class__ = FusedLinear4bit
    return len(layers)
