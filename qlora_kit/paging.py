"""Paged optimizer state: moments in memory that CUDA moves between GPU and host, so that they never make the GPU run out.

bitsandbytes (0.50) allocates them so at the first step, but loading a checkpoint puts them on the GPU for good.
"""

from collections.abc import Callable
from typing import Any

import torch

MOMENTS = ("state1", "state2")


def page_again(optimizer: Any, allocate: Callable[..., torch.Tensor] | None = None) -> int:
    """Move loaded moments into paged memory, by bitsandbytes' own rule: of a paged optimizer, from 100,000 elements on.

    Args:
        optimizer: any; one that is not paged is left alone.
        allocate: (*shape, dtype, device) -> a tensor with `is_paged`; bitsandbytes' own by default, which needs a GPU.

    Returns:
        How many tensors were moved.
    """
    if not getattr(optimizer, "is_paged", False):
        return 0
    if allocate is None:
        from bitsandbytes.functional import get_paged

        allocate = get_paged
    moved = 0
    for parameter, state in optimizer.state.items():
        for name in MOMENTS:
            value = state.get(name)
            if value is None or value.numel() < 1e5 or getattr(value, "is_paged", False):
                continue
            paged = allocate(*value.shape, dtype=value.dtype, device=parameter.device)
            paged.copy_(value)
            optimizer.page_mng.paged_tensors.append(paged)
            state[name] = paged
            moved += 1
    return moved
