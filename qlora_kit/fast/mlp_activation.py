"""silu(gate) · up, forward and backward, with the LoRA sums that can be taken while its tensors are read.

The widest tensors of a layer are here: at 16 x 512 tokens of Qwen2.5-3B, gate, up and silu(gate) · up take 172 MiB each. LoRA on
`down` needs silu(gate) · up after dropout, the gradient of its A needs it again, and the gradients of gate's and up's B need the
gradients of both: as separate steps, 18 passes over such a tensor. On a GPU with Triton, one kernel forward and one backward take
3 and 5 passes; elsewhere torch computes the same in steps.
"""

import torch
import torch.nn.functional as F

from qlora_kit.fast.nf4 import why_no_triton
from qlora_kit.fast.projection import Lora, add_in_fp32, apply_dropout, reduce_to_rank, upcast

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Partial sums of the gradients of down's A, (p, rank, mlp), and of gate's and of up's B, (p, mlp, rank); None: not adapted.
Sums = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]

LARGEST_RANK = 64  # whose sums fit into a processor's registers
FORWARD = {"block_rows": 64, "block_columns": 64, "num_warps": 8}
BACKWARD = {"block_rows": 16, "block_columns": 64, "num_warps": 4}
# Most tiles of one program: along its rows in the forward kernel, along its columns in the backward one.
FORWARD_TILES, BACKWARD_TILES = 16, 64
PROGRAMS = 512  # fewest programs of a kernel, so that all of a GPU's processors have work


def activate(gates: torch.Tensor, down: Lora | None, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return y = silu(gate) · up, (N, mlp), and partial sums (p, N, rank) of xa = scale / keep · ỹ Aᵀ for `down`.

    Args:
        gates: (N, 2 · mlp), gate and up side by side.
        key: of the dropout mask of `down`.
    """
    gate, up = gates.chunk(2, 1)
    y = F.silu(gate) * up
    return y, None if down is None else upcast(reduce_to_rank(y, down, key))[None]


def activate_backward(
    dy: torch.Tensor, u: torch.Tensor | None, gates: torch.Tensor, xa: torch.Tensor | None, key: torch.Tensor,
    down: Lora | None, gate_up: Lora | None,
) -> tuple[torch.Tensor, Sums]:  # fmt: skip
    """Return the gradients of gate and up, (N, 2 · mlp), and partial sums of those of down's A and of gate's and up's B.

    With σ = sigmoid(g), the derivatives of silu(g) u = g σ u are u σ (1 + g (1 - σ)) for g, and g σ for u.

    Args:
        dy: (N, mlp), gradient of y through the frozen weight of `down`.
        u: (N, rank), gradient of the xa of `down` (projection.compute_rank_gradient).
        xa: (N, k · rank), of gate and up.
    """
    gate, up = gates.chunk(2, 1)
    g, sigmoid = upcast(gate), torch.sigmoid(upcast(gate))
    sum_of_A = None
    if u is not None and down is not None:
        sum_of_A = (u.T @ apply_dropout((g * sigmoid * upcast(up)).to(dy.dtype), key, down.keep))[None] * down.factor
        dy = add_in_fp32(dy, apply_dropout(u @ down.scaled_A(dy.dtype), key, down.keep))
    dgate = (upcast(dy) * upcast(up) * sigmoid * (1 + g * (1 - sigmoid))).to(dy.dtype)
    dup = (upcast(dy) * g * sigmoid).to(dy.dtype)
    sums_of_B: list[torch.Tensor | None] = [None, None]
    if xa is not None and gate_up is not None:
        columns = iter(xa.split(gate_up.rank, 1))
        sums_of_B = [None if b is None else (d.T @ next(columns))[None] for d, b in zip((dgate, dup), gate_up.B, strict=True)]
    return torch.cat([dgate, dup], 1), (sum_of_A, sums_of_B[0], sums_of_B[1])


def add_sums(sums: Sums, down_gradients: Lora | None, gate_up_gradients: Lora | None) -> None:
    """Add the partial sums of `activate_backward` to the gradients."""
    B = gate_up_gradients.B if gate_up_gradients else (None, None)
    targets = (None if down_gradients is None else down_gradients.A, *B)
    for target, partial_sums in zip(targets, sums, strict=True):
        if target is not None and partial_sums is not None:
            target.add_(partial_sums.sum(0))


def has_kernels(gates: torch.Tensor, *adapters: Lora | None) -> bool:
    """Return whether the Triton kernels can run: 16-bit numbers on a GPU, and one rank of at most LARGEST_RANK."""
    ranks = {adapter.rank for adapter in adapters if adapter is not None}
    fitting = len(ranks) <= 1 and max(ranks, default=0) <= LARGEST_RANK
    return fitting and gates.is_cuda and gates.element_size() == 2 and why_no_triton() is None


def activate_triton(gates: torch.Tensor, down: Lora | None, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute `activate` by one kernel."""
    rows, columns = len(gates), gates.shape[1] // 2
    y = gates.new_empty(rows, columns)
    row_blocks, column_blocks = triton.cdiv(rows, FORWARD["block_rows"]), triton.cdiv(columns, FORWARD["block_columns"])
    tiles = _tiles_per_program(FORWARD_TILES, column_blocks, row_blocks)
    rank = down.rank if down else 0
    partial_sums = gates.new_empty(triton.cdiv(column_blocks, tiles), rows, rank, dtype=torch.float32)
    _activate_kernel[(row_blocks, len(partial_sums))](
        gates, down.A if down else gates, key, y, partial_sums, rows, columns, *_threshold_and_factor(down), rank=rank,
        padded=_pad_rank(rank), drops=down is not None and down.keep < 1.0, tiles=tiles, **FORWARD,
    )  # fmt: skip
    return y, partial_sums if down else None


def activate_backward_triton(
    dy: torch.Tensor, u: torch.Tensor | None, gates: torch.Tensor, xa: torch.Tensor | None, key: torch.Tensor,
    down: Lora | None, gate_up: Lora | None,
) -> tuple[torch.Tensor, Sums]:  # fmt: skip
    """Compute `activate_backward` by one kernel; its programs write partial sums, so that the order of addition is fixed."""
    rows, columns = dy.shape
    dgates = torch.empty_like(gates)
    has_down, (has_gate, has_up) = down is not None, (b is not None for b in (gate_up.B if gate_up else (None, None)))
    rank = max(lora.rank if lora else 0 for lora in (down, gate_up))
    column_blocks, row_blocks = triton.cdiv(columns, BACKWARD["block_columns"]), triton.cdiv(rows, BACKWARD["block_rows"])
    tiles = _tiles_per_program(BACKWARD_TILES, row_blocks, column_blocks)
    count = triton.cdiv(row_blocks, tiles)
    sums = dy.new_empty(3, count, columns, rank, dtype=torch.float32)
    _activate_backward_kernel[(column_blocks, count)](
        dy, dy if u is None else u, gates, down.A if down else dy, dy if xa is None else xa, key, dgates, sums, rows, columns,
        count, *_threshold_and_factor(down), rank=rank, padded=_pad_rank(rank), width=0 if xa is None else xa.shape[1],
        drops=down is not None and down.keep < 1.0, has_down=has_down, has_gate=has_gate, has_up=has_up, tiles=tiles,
        **BACKWARD, **({"maxnreg": 128} if rank <= 16 else {}),
    )  # fmt: skip
    sum_of_A = sums[0].view(count, rank, columns) if has_down else None
    return dgates, (sum_of_A, sums[1] if has_gate else None, sums[2] if has_up else None)


def _tiles_per_program(most: int, count: int, parallel: int) -> int:
    """Share `count` tiles out to programs, of which `parallel` run for each share, so that there are PROGRAMS or more."""
    tiles = most
    while tiles > 1 and parallel * triton.cdiv(count, tiles) < PROGRAMS:
        tiles //= 2
    return tiles


def _threshold_and_factor(lora: Lora | None) -> tuple[int, float]:
    """Return the threshold of projection.draw_keep_mask, and the factor of A."""
    return (int(lora.keep * 2**31) - 1, lora.factor) if lora else (0, 1.0)


def _pad_rank(rank: int) -> int:
    """Return the columns of a tile that holds `rank` of them: tensor cores take 16 or more."""
    return max(16, triton.next_power_of_2(rank))


if triton is not None:

    @triton.jit
    def _keep_mask(row, column, columns, key, threshold):
        """Compute projection.draw_keep_mask for a tile."""
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
        row, r = tl.arange(0, block_rows)[:, None], tl.arange(0, padded)[None, :]
        gates += top.to(tl.int64) * 2 * columns  # offsets within a tile fit 32 bits
        y += top.to(tl.int64) * columns
        key_bits = tl.load(key).to(tl.uint32, bitcast=True)
        total = tl.zeros((block_rows, padded), tl.float32)
        for tile in range(tiles):
            first = (tl.program_id(1) * tiles + tile) * block_columns
            column = first + tl.arange(0, block_columns)[None, :]
            inside = (top + row < rows) & (column < columns)
            offset = row * 2 * columns + column
            gate = tl.load(gates + offset, inside, 0.0).to(tl.float32)
            up = tl.load(gates + offset + columns, inside, 0.0).to(tl.float32)
            value = (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty)
            tl.store(y + row * columns + column, value, inside)
            if rank > 0:
                if drops:
                    value = tl.where(_keep_mask(top + row, column, columns, key_bits, threshold), value, 0.0)
                column_of_A = first + tl.arange(0, block_columns)[:, None]
                a = tl.load(A + r * columns + column_of_A, (r < rank) & (column_of_A < columns), 0.0)  # (columns, rank)
                total = tl.dot(value, (a * factor).to(value.dtype), total)
        if rank > 0:
            offset = (tl.program_id(1) * rows + top + row) * rank + r
            tl.store(sums + offset, total, (top + row < rows) & (r < rank))

    @triton.jit
    def _activate_backward_kernel(
        dy, u, gates, A, xa, key, dgates, sums, rows, columns, count, threshold, factor, rank: tl.constexpr, padded: tl.constexpr,
        width: tl.constexpr, drops: tl.constexpr, has_down: tl.constexpr, has_gate: tl.constexpr, has_up: tl.constexpr,
        block_rows: tl.constexpr, block_columns: tl.constexpr, tiles: tl.constexpr,
    ):  # fmt: skip
        column = tl.program_id(0) * block_columns + tl.arange(0, block_columns)[None, :]
        row, r, rank_row = tl.arange(0, block_rows)[:, None], tl.arange(0, padded)[None, :], tl.arange(0, padded)[:, None]
        key_bits = tl.load(key).to(tl.uint32, bitcast=True)
        dtype = dy.dtype.element_ty
        if has_down:
            a = tl.load(A + rank_row * columns + column, (rank_row < rank) & (column < columns), 0.0)  # (rank, columns)
            a = (a * factor).to(dtype)
        total_a = tl.zeros((block_columns, padded), tl.float32)
        total_gate = tl.zeros((block_columns, padded), tl.float32)
        total_up = tl.zeros((block_columns, padded), tl.float32)
        for tile in range(tiles):
            top = (tl.program_id(1) * tiles + tile) * block_rows
            start = top.to(tl.int64) * columns  # offsets within a tile fit 32 bits
            inside = (top + row < rows) & (column < columns)
            offset = row * 2 * columns + column
            gate = tl.load(gates + 2 * start + offset, inside, 0.0).to(tl.float32)
            up = tl.load(gates + 2 * start + columns + offset, inside, 0.0).to(tl.float32)
            d = tl.load(dy + start + row * columns + column, inside, 0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            if has_down:
                ut = tl.load(u + (top + row) * rank + r, (top + row < rows) & (r < rank), 0.0)  # (rows, rank)
                update, value = tl.dot(ut, a), (silu * up).to(dtype)
                if drops:
                    keep = _keep_mask(top + row, column, columns, key_bits, threshold)
                    update, value = tl.where(keep, update, 0.0), tl.where(keep, value, 0.0)
                d += update
                total_a = tl.dot(tl.trans(value), ut, total_a)
            dgate = (d * up * sigmoid * (1 + gate * (1 - sigmoid))).to(dtype)
            dup = (d * silu).to(dtype)
            tl.store(dgates + 2 * start + offset, dgate, inside)
            tl.store(dgates + 2 * start + columns + offset, dup, inside)
            if has_gate:
                xt = tl.load(xa + (top + row) * width + r, (top + row < rows) & (r < rank), 0.0)
                total_gate = tl.dot(tl.trans(dgate), xt, total_gate)
            if has_up:
                xt = tl.load(xa + (top + row) * width + has_gate * rank + r, (top + row < rows) & (r < rank), 0.0)
                total_up = tl.dot(tl.trans(dup), xt, total_up)
        mlp_row = tl.program_id(0) * block_columns + tl.arange(0, block_columns)[:, None]
        target = (tl.program_id(1) * columns + mlp_row) * rank + r
        plane = count * rank * columns
        valid = (r < rank) & (mlp_row < columns)
        if has_down:
            target_of_A = (tl.program_id(1) * rank + r) * columns + mlp_row
            tl.store(sums + target_of_A, total_a * factor, valid)
        if has_gate:
            tl.store(sums + plane + target, total_gate, valid)
        if has_up:
            tl.store(sums + 2 * plane + target, total_up, valid)
