"""silu(gate) · up, forward and backward, with every LoRA sum that can be taken while its tensors pass by.

The widest tensors of a layer are here: at 16 x 512 tokens of Qwen2.5-3B, gate, up and their product take 172 MiB each. Between
the products with frozen weights, the update of `down` needs the product dropped out, its gradient needs that again, and the
gradients of gate's and up's B need both gradients: written as separate steps, 18 passes over such a tensor. On a GPU with Triton
one kernel forward and one backward make 3 and 5 of them; elsewhere torch does the same in steps.
"""

from typing import Any

import torch
import torch.nn.functional as F

from qlora_kit.fast.nf4 import why_no_triton
from qlora_kit.fast.projection import Lora, add, dropped, reduced, wide

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# For the gradients of down's A (parts, rank, mlp), and of gate's and up's B (parts, mlp, rank): their sums; None: not adapted.
Sums = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]

LARGEST_RANK = 64  # whose sums fit a processor's registers
FORWARD = {"block_rows": 64, "block_columns": 64, "num_warps": 8}
BACKWARD = {"block_rows": 16, "block_columns": 64, "num_warps": 4}
# Tiles that a program walks at most: along its rows in the forward kernel, along its columns in the backward one.
FORWARD_TILES, BACKWARD_TILES = 16, 64
PROGRAMS = 512  # that a kernel is cut into at least, so that all of a GPU's processors have work


def activate(gates: torch.Tensor, down: Lora | None, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y = silu(gate) · up, (N, mlp), and parts (p, N, rank) whose sum is what `down` makes of it, xa = scale / keep · ỹ Aᵀ.

    Args:
        gates: (N, 2 · mlp), gate and up side by side.
        key: of the dropout mask of `down`.
    """
    gate, up = gates.chunk(2, 1)
    y = F.silu(gate) * up
    return y, None if down is None else wide(reduced(y, down, key))[None]


def activate_backward(
    dy: torch.Tensor,
    u: torch.Tensor | None,
    gates: torch.Tensor,
    xa: torch.Tensor | None,
    key: torch.Tensor,
    down: Lora | None,
    gate_up: Lora | None,
) -> tuple[torch.Tensor, Sums]:
    """Gradients of gate and up, (N, 2 · mlp), and the sums for those of down's A and of gate's and up's B.

    With σ = sigmoid(g): d(g σ u) = (u σ (1 + g (1 - σ)), g σ).

    Args:
        dy: (N, mlp), what came through the frozen weight of `down`.
        u: (N, rank), what came to its A (projection.gradient_of_xa).
        xa: (N, k · rank), what gate and up made of their input.
    """
    gate, up = gates.chunk(2, 1)
    g, sigmoid = wide(gate), torch.sigmoid(wide(gate))
    sum_of_A = None
    if u is not None and down is not None:
        sum_of_A = (u.T @ dropped((g * sigmoid * wide(up)).to(dy.dtype), key, down.keep))[None] * down.factor
        dy = add(dy, dropped(u @ down.scaled_A(dy.dtype), key, down.keep))
    dgate, dup = (wide(dy) * wide(up) * sigmoid * (1 + g * (1 - sigmoid))).to(dy.dtype), (wide(dy) * g * sigmoid).to(dy.dtype)
    sums_of_B: list[torch.Tensor | None] = [None, None]
    if xa is not None and gate_up is not None:
        columns = iter(xa.split(gate_up.rank, 1))
        sums_of_B = [None if b is None else (d.T @ next(columns))[None] for d, b in zip((dgate, dup), gate_up.B, strict=True)]
    return torch.cat([dgate, dup], 1), (sum_of_A, sums_of_B[0], sums_of_B[1])


def add_sums(sums: Sums, down_gradients: Lora | None, gate_up_gradients: Lora | None) -> None:
    """Add what `activate_backward` summed up."""
    B = gate_up_gradients.B if gate_up_gradients else (None, None)
    targets = (None if down_gradients is None else down_gradients.A, *B)
    for target, parts in zip(targets, sums, strict=True):
        if target is not None and parts is not None:
            target.add_(parts.sum(0))


def has_kernels(gates: torch.Tensor, *adapters: Lora | None) -> bool:
    """Whether the kernels below can do it: 16-bit numbers on a GPU with Triton, one rank of at most LARGEST_RANK."""
    ranks = {adapter.rank for adapter in adapters if adapter is not None}
    fitting = len(ranks) <= 1 and max(ranks, default=0) <= LARGEST_RANK
    return fitting and gates.is_cuda and gates.element_size() == 2 and why_no_triton() is None


def activate_in_one(gates: torch.Tensor, down: Lora | None, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`activate` by one kernel."""
    rows, columns = len(gates), gates.shape[1] // 2
    y = gates.new_empty(rows, columns)
    beside, across = triton.cdiv(rows, FORWARD["block_rows"]), triton.cdiv(columns, FORWARD["block_columns"])
    tiles = _tiles(FORWARD_TILES, across, beside)
    rank = down.rank if down else 0
    parts = gates.new_empty(triton.cdiv(across, tiles), rows, rank, dtype=torch.float32)
    _activate_kernel[(beside, len(parts))](
        gates, down.A if down else gates, key, y, parts, rows, columns, *_numbers(down), rank=rank, padded=_padded(rank),
        drops=down is not None and down.keep < 1.0, tiles=tiles, **FORWARD,
    )  # fmt: skip
    return y, parts if down else None


def activate_backward_in_one(
    dy: torch.Tensor,
    u: torch.Tensor | None,
    gates: torch.Tensor,
    xa: torch.Tensor | None,
    key: torch.Tensor,
    down: Lora | None,
    gate_up: Lora | None,
) -> tuple[torch.Tensor, Sums]:
    """`activate_backward` by one kernel, whose programs leave parts of the sums, to be added in the same order always."""
    rows, columns = dy.shape
    dgates = torch.empty_like(gates)
    has_down, (has_gate, has_up) = down is not None, (b is not None for b in (gate_up.B if gate_up else (None, None)))
    rank = max(lora.rank if lora else 0 for lora in (down, gate_up))
    beside, downwards = triton.cdiv(columns, BACKWARD["block_columns"]), triton.cdiv(rows, BACKWARD["block_rows"])
    tiles = _tiles(BACKWARD_TILES, downwards, beside)
    count = triton.cdiv(downwards, tiles)
    sums = dy.new_empty(3, count, columns, rank, dtype=torch.float32)
    _activate_backward_kernel[(beside, count)](
        dy, dy if u is None else u, gates, down.A if down else dy, dy if xa is None else xa, key, dgates, sums,
        rows, columns, count, *_numbers(down), rank=rank, padded=_padded(rank), width=0 if xa is None else xa.shape[1],
        drops=down is not None and down.keep < 1.0, has_down=has_down, has_gate=has_gate, has_up=has_up, tiles=tiles,
        **BACKWARD, **({"maxnreg": 128} if rank <= 16 else {}),
    )  # fmt: skip
    sum_of_A = sums[0].view(count, rank, columns) if has_down else None
    return dgates, (sum_of_A, sums[1] if has_gate else None, sums[2] if has_up else None)


def _tiles(most: int, there: int, beside: int) -> int:
    """Tiles that a program walks, of those `there`, when `beside` programs stand side by side."""
    tiles = most
    while tiles > 1 and beside * triton.cdiv(there, tiles) < PROGRAMS:
        tiles //= 2
    return tiles


def _numbers(lora: Lora | None) -> tuple[int, float]:
    """The threshold of projection.keep_mask, and the factor of A."""
    return (int(lora.keep * 2**31) - 1, lora.factor) if lora else (0, 1.0)


def _padded(rank: int) -> Any:
    """Columns of a tile that holds `rank` of them: tensor cores take 16 at least."""
    return max(16, triton.next_power_of_2(rank))


if triton is not None:

    @triton.jit
    def _kept(row, column, columns, key, threshold):
        """projection.keep_mask of a tile."""
        h = (row * columns + column).to(tl.uint32) ^ key
        h ^= h >> 16
        h *= 0x7FEB352D
        h ^= h >> 15
        h *= 0x846CA68B
        h ^= h >> 16
        return (h & 0x7FFFFFFF) <= threshold

    @triton.jit
    def _activate_kernel(
        gates, A, key, y, sums, rows, columns, threshold, factor, rank: tl.constexpr, padded: tl.constexpr, drops: tl.constexpr,
        block_rows: tl.constexpr, block_columns: tl.constexpr, tiles: tl.constexpr,
    ):  # fmt: skip
        top = tl.program_id(0) * block_rows
        above, r = tl.arange(0, block_rows)[:, None], tl.arange(0, padded)[None, :]
        gates += top.to(tl.int64) * 2 * columns  # offsets within a tile fit 32 bits
        y += top.to(tl.int64) * columns
        word = tl.load(key).to(tl.uint32, bitcast=True)
        total = tl.zeros((block_rows, padded), tl.float32)
        for tile in range(tiles):
            first = (tl.program_id(1) * tiles + tile) * block_columns
            column = first + tl.arange(0, block_columns)[None, :]
            inside = (top + above < rows) & (column < columns)
            place = above * 2 * columns + column
            gate = tl.load(gates + place, inside, 0.0).to(tl.float32)
            up = tl.load(gates + place + columns, inside, 0.0).to(tl.float32)
            value = (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty)
            tl.store(y + above * columns + column, value, inside)
            if rank > 0:
                if drops:
                    value = tl.where(_kept(top + above, column, columns, word, threshold), value, 0.0)
                below = first + tl.arange(0, block_columns)[:, None]
                a = tl.load(A + r * columns + below, (r < rank) & (below < columns), 0.0)  # (columns, rank)
                total = tl.dot(value, (a * factor).to(value.dtype), total)
        if rank > 0:
            place = (tl.program_id(1) * rows + top + above) * rank + r
            tl.store(sums + place, total, (top + above < rows) & (r < rank))

    @triton.jit
    def _activate_backward_kernel(
        dy, u, gates, A, xa, key, dgates, sums, rows, columns, count, threshold, factor, rank: tl.constexpr, padded: tl.constexpr,
        width: tl.constexpr, drops: tl.constexpr, has_down: tl.constexpr, has_gate: tl.constexpr, has_up: tl.constexpr,
        block_rows: tl.constexpr, block_columns: tl.constexpr, tiles: tl.constexpr,
    ):  # fmt: skip
        column = tl.program_id(0) * block_columns + tl.arange(0, block_columns)[None, :]
        above, r, below = tl.arange(0, block_rows)[:, None], tl.arange(0, padded)[None, :], tl.arange(0, padded)[:, None]
        word = tl.load(key).to(tl.uint32, bitcast=True)
        kind = dy.dtype.element_ty
        if has_down:
            a = tl.load(A + below * columns + column, (below < rank) & (column < columns), 0.0)  # (rank, columns)
            a = (a * factor).to(kind)
        total_a = tl.zeros((block_columns, padded), tl.float32)
        total_gate = tl.zeros((block_columns, padded), tl.float32)
        total_up = tl.zeros((block_columns, padded), tl.float32)
        for tile in range(tiles):
            top = (tl.program_id(1) * tiles + tile) * block_rows
            start = top.to(tl.int64) * columns  # offsets within a tile fit 32 bits
            inside = (top + above < rows) & (column < columns)
            place = above * 2 * columns + column
            gate = tl.load(gates + 2 * start + place, inside, 0.0).to(tl.float32)
            up = tl.load(gates + 2 * start + columns + place, inside, 0.0).to(tl.float32)
            d = tl.load(dy + start + above * columns + column, inside, 0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            if has_down:
                ut = tl.load(u + (top + above) * rank + r, (top + above < rows) & (r < rank), 0.0)  # (rows, rank)
                update, value = tl.dot(ut, a), (silu * up).to(kind)
                if drops:
                    kept = _kept(top + above, column, columns, word, threshold)
                    update, value = tl.where(kept, update, 0.0), tl.where(kept, value, 0.0)
                d += update
                total_a = tl.dot(tl.trans(value), ut, total_a)
            dgate = (d * up * sigmoid * (1 + gate * (1 - sigmoid))).to(kind)
            dup = (d * silu).to(kind)
            tl.store(dgates + 2 * start + place, dgate, inside)
            tl.store(dgates + 2 * start + columns + place, dup, inside)
            if has_gate:
                xt = tl.load(xa + (top + above) * width + r, (top + above < rows) & (r < rank), 0.0)
                total_gate = tl.dot(tl.trans(dgate), xt, total_gate)
            if has_up:
                xt = tl.load(xa + (top + above) * width + has_gate * rank + r, (top + above < rows) & (r < rank), 0.0)
                total_up = tl.dot(tl.trans(dup), xt, total_up)
        downwards = tl.program_id(0) * block_columns + tl.arange(0, block_columns)[:, None]
        target = (tl.program_id(1) * columns + downwards) * rank + r
        plane = count * rank * columns
        wanted = (r < rank) & (downwards < columns)
        if has_down:
            across = (tl.program_id(1) * rank + r) * columns + downwards
            tl.store(sums + across, total_a * factor, wanted)
        if has_gate:
            tl.store(sums + plane + target, total_gate, wanted)
        if has_up:
            tl.store(sums + 2 * plane + target, total_up, wanted)
