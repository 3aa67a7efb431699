"""The fast training pass: fused 4-bit LoRA layers without autograd, compiled and replayed as CUDA graphs."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_kit.fast.step import FastStep

__all__ = ["FastStep"]


def __getattr__(name: str) -> type:
    """Import FastStep when it is first used: other files of this room need no peft, which takes seconds to import."""
    if name != "FastStep":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qlora_kit.fast.step import FastStep

    return FastStep
