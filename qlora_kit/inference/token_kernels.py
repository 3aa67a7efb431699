"""Kernels for decoding one token at a time, which is bound by reading weights.

The product of one token with 4-bit weights unpacks them in registers and writes no unpacked weight to memory: one kernel for each
weight, on a GPU with Triton. Several answers at once, and the many tokens of a prompt, take torch's product. The other functions
are one kernel each for any number of tokens. On CPUs and in other dtypes torch computes the same.

Rows are tokens: x is (N, in).
"""

from typing import Any

import torch
import torch.nn.functional as F

from qlora_kit.fast.llama_layer import Rotary, rms_norm
from qlora_kit.fast.llama_parts import ProjectionGroup
from qlora_kit.fast.nf4 import has_kernel, unpack_stacked, why_no_triton

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Rows of a weight, and quantization blocks of each, that a program reads at a time: the fastest of 22 pairs on an H200.
PRODUCT = {"block_out": 1, "groups": 32, "num_warps": 1}


def project(x: torch.Tensor, group: ProjectionGroup) -> torch.Tensor:
    """Return x Wᵀ + (x Aᵀ) Bᵀ + bias, (N, Σ out_i), in x's dtype.

    Args:
        group: its LoRA matrices are in x's dtype, and A is scaled by alpha / rank.
    """

    def has_whole_blocks(weight: Any) -> bool:  # in each row, which the kernel needs
        return has_kernel(weight, x.dtype) and weight.quant_state.shape[1] % weight.quant_state.blocksize == 0

    if len(x) == 1 and has_kernels(x) and all(map(has_whole_blocks, group.weights)):
        return _project_triton(x, group)
    # One product after the other, so that only one weight is unpacked at a time.
    y = torch.cat([F.linear(x, _unpack(weight, x.dtype)) for weight in group.weights], 1)
    if group.bias is not None:
        y = y + group.bias
    if group.lora is None:
        return y
    columns = iter((x @ group.lora.A.T).split([b.shape[1] for b in group.lora.B if b is not None], 1))
    pairs = zip(group.lora.B, group.sizes, strict=True)
    return y + torch.cat([x.new_zeros(len(x), size) if b is None else next(columns) @ b.T for b, size in pairs], 1)


def _unpack(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    return unpack_stacked((weight,), (None,), 0, dtype) if hasattr(weight, "quant_state") else weight


def add_and_norm(
    h: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return h + update, (N, hidden), and the RMS norm of this sum; h itself if there is no update yet."""
    if update is None:
        return h, rms_norm(h, weight, epsilon)
    if not has_kernels(h):
        h = h + update
        return h, rms_norm(h, weight, epsilon)
    total, x, size = torch.empty_like(h), torch.empty_like(h), h.shape[1]
    _add_and_norm_kernel[(len(h),)](
        h, update, weight, total, x, epsilon, size=size, padded=triton.next_power_of_2(size), num_warps=8
    )
    return total, x


def apply_gate(gates: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) · up, (N, mlp), of gate and up side by side, (N, 2 · mlp)."""
    if not has_kernels(gates):
        gate, up = gates.chunk(2, 1)
        return F.silu(gate) * up
    rows, columns = len(gates), gates.shape[1] // 2
    y = gates.new_empty(rows, columns)
    _apply_gate_kernel[(rows, triton.cdiv(columns, 512))](gates, y, columns=columns, block_columns=512, num_warps=4)
    return y


def rotate_and_store(
    product: torch.Tensor, sizes: tuple[int, ...], rotary: Rotary, positions: torch.Tensor, keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Return q, rotated, of one token of each answer, and store k, rotated, and v in the cache; by one kernel (`has_kernels`).

    Args:
        product: (B, Σ sizes), q, k and v side by side.
        rotary: the table of all positions, (capacity, size).
        positions: (B, 1), of the tokens.
        keys, values: the cache, (B, heads of k, capacity, size).

    Returns:
        (B, heads of q, 1, size).
    """
    batch, heads_k, capacity, size = keys.shape
    heads = sizes[0] // size
    q = product.new_empty(batch, heads, 1, size)
    _rotate_and_store_kernel[(batch, heads + 2 * heads_k)](
        product, rotary.cos, rotary.sin, positions, q, keys, values, heads, heads_k, capacity, size=size,
        padded=triton.next_power_of_2(size), num_warps=1,
    )  # fmt: skip
    return q


def has_kernels(x: torch.Tensor) -> bool:
    """Return whether the Triton kernels can run: 16-bit numbers on a GPU."""
    return x.is_cuda and x.element_size() == 2 and why_no_triton() is None


def _project_triton(x: torch.Tensor, group: ProjectionGroup) -> torch.Tensor:
    y, lora = x.new_empty(1, sum(group.sizes)), group.lora
    xa, B = (x, (None,) * len(group.sizes)) if lora is None else (x.new_empty(1, len(lora.A)), lora.B)
    if lora is not None:  # xa = x Aᵀ of the one token
        _reduce_kernel[(len(lora.A),)](x, lora.A, xa, fan_in=x.shape[1], block_in=2048, num_warps=4)
    first = column = 0
    for weight, b, size in zip(group.weights, B, group.sizes, strict=True):
        state, rank = weight.quant_state, 0 if b is None else b.shape[1]
        _project_kernel[(triton.cdiv(size, PRODUCT["block_out"]),)](
            x, weight.data, state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset,
            xa, x if b is None else b, x if group.bias is None else group.bias, y, size, first, column,
            blocks=x.shape[1] // state.blocksize, rank=rank, padded=triton.next_power_of_2(max(rank, 1)),
            has_bias=group.bias is not None, block=state.blocksize, outer_block=state.state2.blocksize, **PRODUCT,
        )  # fmt: skip
        first, column = first + size, column + rank
    return y


if triton is not None:

    @triton.jit
    def _project_kernel(
        x, data, table, absmax, outer_table, outer_absmax, offset, xa, b, bias, y, size, first, column,
        blocks: tl.constexpr, rank: tl.constexpr, padded: tl.constexpr, has_bias: tl.constexpr, block: tl.constexpr,
        outer_block: tl.constexpr, block_out: tl.constexpr, groups: tl.constexpr,
    ):  # fmt: skip
        """Compute `block_out` elements of the product: the sum of each quantization block, times the scale of the block."""
        out_row = tl.program_id(0) * block_out + tl.arange(0, block_out)
        half = tl.arange(0, block // 2)
        total = tl.zeros((block_out, groups), tl.float32)
        shift = tl.load(offset)
        dtype_of_x = x.dtype.element_ty
        pairs = x.to(tl.pointer_type(tl.int32), bitcast=True)
        for start in range(0, blocks, groups):
            group = start + tl.arange(0, groups)
            block_index = out_row[:, None] * blocks + group[None, :]
            inside = (out_row[:, None] < size) & (group[None, :] < blocks)
            inner = tl.load(absmax + block_index, inside, 0).to(tl.int32)
            scale = tl.load(outer_table + inner) * tl.load(outer_absmax + block_index // outer_block, inside, 0.0) + shift
            byte_index = block_index[:, :, None] * (block // 2) + half[None, None, :]
            byte = tl.load(data + byte_index, inside[:, :, None], 0).to(tl.int32)  # two values, the first in the high half
            # Two elements of x at a time, as in a byte: one at a time, neighbours in a warp would read addresses far apart.
            pair = tl.load(pairs + group[:, None] * (block // 2) + half[None, :], group[:, None] < blocks, 0)
            even_x = pair.to(tl.int16).to(dtype_of_x, bitcast=True).to(tl.float32)
            odd_x = (pair >> 16).to(tl.int16).to(dtype_of_x, bitcast=True).to(tl.float32)
            values = tl.load(table + (byte >> 4)) * even_x[None, :, :]
            values += tl.load(table + (byte & 15)) * odd_x[None, :, :]
            total += tl.sum(values, 2) * scale
        result = tl.sum(total, 1)
        if rank > 0:
            r = tl.arange(0, padded)
            b_rows = tl.load(b + out_row[:, None] * rank + r[None, :], (out_row[:, None] < size) & (r[None, :] < rank), 0.0)
            xa_values = tl.load(xa + column + r, r < rank, 0.0)
            result += tl.sum(b_rows.to(tl.float32) * xa_values.to(tl.float32)[None, :], 1)
        if has_bias:
            result += tl.load(bias + first + out_row, out_row < size, 0.0).to(tl.float32)
        tl.store(y + first + out_row, result.to(y.dtype.element_ty), out_row < size)

    @triton.jit
    def _reduce_kernel(x, A, xa, fan_in: tl.constexpr, block_in: tl.constexpr):
        total = tl.zeros((block_in,), tl.float32)
        for start in range(0, fan_in, block_in):
            column = start + tl.arange(0, block_in)
            a = tl.load(A + tl.program_id(0) * fan_in + column, column < fan_in, 0.0).to(tl.float32)
            total += a * tl.load(x + column, column < fan_in, 0.0).to(tl.float32)
        tl.store(xa + tl.program_id(0), tl.sum(total, 0).to(xa.dtype.element_ty))

    @triton.jit
    def _rotate_and_store_kernel(
        product, cos, sin, positions, q, keys, values, heads, heads_k, capacity, size: tl.constexpr, padded: tl.constexpr
    ):
        row, head, column = tl.program_id(0), tl.program_id(1), tl.arange(0, padded)
        inside = column < size
        dtype_of_q = q.dtype.element_ty
        source = product + (row * (heads + 2 * heads_k) + head) * size
        position = tl.load(positions + row)
        value = tl.load(source + column, inside, 0.0)
        if head < heads + heads_k:
            other = tl.load(source + (column + size // 2) % size, inside, 0.0)  # of the head's other half
            straight = value * tl.load(cos + position * size + column, inside, 0.0)
            crosswise = other * tl.load(sin + position * size + column, inside, 0.0)
            value = (straight.to(tl.float32) + crosswise.to(tl.float32)).to(dtype_of_q)
        if head < heads:
            tl.store(q + (row * heads + head) * size + column, value, inside)
        elif head < heads + heads_k:
            tl.store(keys + ((row * heads_k + head - heads) * capacity + position) * size + column, value, inside)
        else:
            tl.store(values + ((row * heads_k + head - heads - heads_k) * capacity + position) * size + column, value, inside)

    @triton.jit
    def _add_and_norm_kernel(h, update, weight, total, x, epsilon, size: tl.constexpr, padded: tl.constexpr):
        row, column = tl.program_id(0), tl.arange(0, padded)
        inside = column < size
        dtype_of_h = h.dtype.element_ty
        value = tl.load(h + row * size + column, inside, 0.0).to(tl.float32)
        value = (value + tl.load(update + row * size + column, inside, 0.0).to(tl.float32)).to(dtype_of_h)
        tl.store(total + row * size + column, value, inside)
        value = value.to(tl.float32)
        normal = (value * tl.rsqrt(tl.sum(value * value, 0) / size + epsilon)).to(dtype_of_h)
        tl.store(x + row * size + column, normal * tl.load(weight + column, inside, 0.0), inside)

    @triton.jit
    def _apply_gate_kernel(gates, y, columns: tl.constexpr, block_columns: tl.constexpr):
        row, column = tl.program_id(0), tl.program_id(1) * block_columns + tl.arange(0, block_columns)
        inside = column < columns
        dtype_of_y = y.dtype.element_ty
        gate = tl.load(gates + row * 2 * columns + column, inside, 0.0).to(tl.float32)
        up = tl.load(gates + row * 2 * columns + columns + column, inside, 0.0).to(tl.float32)
        tl.store(
            y + row * columns + column, ((gate * tl.sigmoid(gate)).to(dtype_of_y).to(tl.float32) * up).to(dtype_of_y), inside
        )
