"""A layer's work on a handful of tokens, as when an answer is written one token at a time: reading the weights is all of it.

The product of one token with 4-bit weights unpacks them in registers and writes nothing back: a kernel for each weight, on a GPU
with Triton; several answers at once and the many tokens of a prompt take torch's product. The other functions are one kernel each
for any number of tokens. The torch form beside a kernel (of `rotate_and_store` in decode.py) serves CPUs and other dtypes, and
computes the same.

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

# Rows of a weight, and quantization blocks of each, that a program reads at a time: the fastest of 22 such on an H200.
PRODUCT = {"block_out": 1, "groups": 32, "num_warps": 1}


def product(x: torch.Tensor, group: ProjectionGroup) -> torch.Tensor:
    """x Wᵀ + (x Aᵀ) Bᵀ + bias, (N, Σ out_i)."""
    if len(x) == 1 and in_one(x) and all(_is_row_packed(weight, x.dtype) for weight in group.weights):
        return _product_in_one(x, None if group.lora is None else _reduce_in_one(x, group.lora.A), group)
    xa = None if group.lora is None else x @ group.lora.A.T
    # One after the other, so that one at a time is unpacked.
    y = torch.cat([F.linear(x, _unpacked(weight, x.dtype)) for weight in group.weights], 1)
    if group.bias is not None:
        y = y + group.bias
    return y if xa is None else y + _update(xa, group)


def _unpacked(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    return unpack_stacked((weight,), (None,), 0, dtype) if hasattr(weight, "quant_state") else weight


def _is_row_packed(weight: Any, dtype: torch.dtype) -> bool:
    """Whether each row is whole quantization blocks, and the kernel can read them."""
    return has_kernel(weight, dtype) and weight.quant_state.shape[1] % weight.quant_state.blocksize == 0


def _update(xa: torch.Tensor, group: ProjectionGroup) -> torch.Tensor:
    assert group.lora is not None
    updates, column = [], 0
    for b, size in zip(group.lora.B, group.sizes, strict=True):
        if b is None:
            updates.append(xa.new_zeros(len(xa), size))
        else:
            updates.append(xa[:, column : column + b.shape[1]] @ b.T)
            column += b.shape[1]
    return torch.cat(updates, 1)


def add_and_norm(
    h: torch.Tensor, came: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """h plus what came, (N, hidden), and its RMS norm."""
    if came is None:
        return h, rms_norm(h, weight, epsilon)
    if in_one(h):
        return _add_and_norm_in_one(h, came, weight, epsilon)
    h = h + came
    return h, rms_norm(h, weight, epsilon)


def gated(gates: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, (N, mlp), of gate and up side by side."""
    if in_one(gates):
        return _gated_in_one(gates)
    gate, up = gates.chunk(2, 1)
    return F.silu(gate) * up


def rotate_and_store(
    product: torch.Tensor, sizes: tuple[int, ...], rotary: Rotary, at: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """q, (B, heads, 1, size), rotated, of one token of each answer, by one kernel; k, rotated, and v go into the cache.

    Args:
        product: (B, Σ sizes), q, k and v side by side.
        rotary: of all positions.
        at: (B, 1), the tokens' positions.
        keys: (B, heads of k, room, size), as `values`.
    """
    batch, heads_k, room, size = keys.shape
    heads = sizes[0] // size
    q = product.new_empty(batch, heads, 1, size)
    _rotate_and_store_kernel[(batch, heads + 2 * heads_k)](
        product, rotary.cos, rotary.sin, at, q, keys, values, heads, heads_k, room, size=size,
        padded=triton.next_power_of_2(size), num_warps=1,
    )  # fmt: skip
    return q


def in_one(x: torch.Tensor) -> bool:
    """Whether the kernels below can do it."""
    return x.is_cuda and x.element_size() == 2 and why_no_triton() is None


def _product_in_one(x: torch.Tensor, xa: torch.Tensor | None, group: ProjectionGroup) -> torch.Tensor:
    y = x.new_empty(1, sum(group.sizes))
    B = group.lora.B if group.lora else (None,) * len(group.sizes)
    first = column = 0
    for weight, b, size in zip(group.weights, B, group.sizes, strict=True):
        state, rank = weight.quant_state, 0 if b is None else b.shape[1]
        _product_kernel[(triton.cdiv(size, PRODUCT["block_out"]),)](
            x, weight.data, state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset,
            x if xa is None else xa, x if b is None else b, x if group.bias is None else group.bias, y, size, first, column,
            blocks=x.shape[1] // state.blocksize, rank=rank, padded=triton.next_power_of_2(max(rank, 1)),
            has_bias=group.bias is not None, block=state.blocksize, outer_block=state.state2.blocksize, **PRODUCT,
        )  # fmt: skip
        first, column = first + size, column + rank
    return y


def _reduce_in_one(x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    xa = x.new_empty(1, len(A))
    _reduce_kernel[(len(A),)](x, A, xa, fan_in=x.shape[1], block_in=2048, num_warps=4)
    return xa


def _add_and_norm_in_one(
    h: torch.Tensor, came: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total, x = torch.empty_like(h), torch.empty_like(h)
    size = h.shape[1]
    _add_and_norm_kernel[(len(h),)](
        h, came, weight, total, x, epsilon, size=size, padded=triton.next_power_of_2(size), num_warps=8
    )
    return total, x


def _gated_in_one(gates: torch.Tensor) -> torch.Tensor:
    rows, columns = len(gates), gates.shape[1] // 2
    y = gates.new_empty(rows, columns)
    _gated_kernel[(rows, triton.cdiv(columns, 512))](gates, y, columns=columns, block_columns=512, num_warps=4)
    return y


if triton is not None:

    @triton.jit
    def _product_kernel(
        x, data, table, absmax, outer_table, outer_absmax, offset, xa, b, bias, y, size, first, column,
        blocks: tl.constexpr, rank: tl.constexpr, padded: tl.constexpr, has_bias: tl.constexpr, block: tl.constexpr,
        outer_block: tl.constexpr, block_out: tl.constexpr, groups: tl.constexpr,
    ):  # fmt: skip
        """`block_out` elements of the product of one token: a quantization block's sum first, then times its scale."""
        here = tl.program_id(0) * block_out + tl.arange(0, block_out)
        half = tl.arange(0, block // 2)
        total = tl.zeros((block_out, groups), tl.float32)
        shift = tl.load(offset)
        kind = x.dtype.element_ty
        pairs = x.to(tl.pointer_type(tl.int32), bitcast=True)
        for start in range(0, blocks, groups):
            group = start + tl.arange(0, groups)
            number = here[:, None] * blocks + group[None, :]
            inside = (here[:, None] < size) & (group[None, :] < blocks)
            inner = tl.load(absmax + number, inside, 0).to(tl.int32)
            scale = tl.load(outer_table + inner) * tl.load(outer_absmax + number // outer_block, inside, 0.0) + shift
            place = number[:, :, None] * (block // 2) + half[None, None, :]
            byte = tl.load(data + place, inside[:, :, None], 0).to(tl.int32)  # two values, the first in the high half
            # Two elements of x at a time, as the bytes have them: one by one, neighbours in a warp would read far apart.
            pair = tl.load(pairs + group[:, None] * (block // 2) + half[None, :], group[:, None] < blocks, 0)
            first_of = pair.to(tl.int16).to(kind, bitcast=True).to(tl.float32)
            second_of = (pair >> 16).to(tl.int16).to(kind, bitcast=True).to(tl.float32)
            values = tl.load(table + (byte >> 4)) * first_of[None, :, :]
            values += tl.load(table + (byte & 15)) * second_of[None, :, :]
            total += tl.sum(values, 2) * scale
        result = tl.sum(total, 1)
        if rank > 0:
            r = tl.arange(0, padded)
            mine = tl.load(b + here[:, None] * rank + r[None, :], (here[:, None] < size) & (r[None, :] < rank), 0.0)
            reduced = tl.load(xa + column + r, r < rank, 0.0)
            result += tl.sum(mine.to(tl.float32) * reduced.to(tl.float32)[None, :], 1)
        if has_bias:
            result += tl.load(bias + first + here, here < size, 0.0).to(tl.float32)
        tl.store(y + first + here, result.to(y.dtype.element_ty), here < size)

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
        product, cos, sin, at, q, keys, values, heads, heads_k, room, size: tl.constexpr, padded: tl.constexpr
    ):
        row, head, column = tl.program_id(0), tl.program_id(1), tl.arange(0, padded)
        inside = column < size
        kind = q.dtype.element_ty
        source = product + (row * (heads + 2 * heads_k) + head) * size
        position = tl.load(at + row)
        value = tl.load(source + column, inside, 0.0)
        if head < heads + heads_k:
            other = tl.load(source + (column + size // 2) % size, inside, 0.0)  # of the head's other half
            straight = value * tl.load(cos + position * size + column, inside, 0.0)
            crosswise = other * tl.load(sin + position * size + column, inside, 0.0)
            value = (straight.to(tl.float32) + crosswise.to(tl.float32)).to(kind)
        if head < heads:
            tl.store(q + (row * heads + head) * size + column, value, inside)
        elif head < heads + heads_k:
            tl.store(keys + ((row * heads_k + head - heads) * room + position) * size + column, value, inside)
        else:
            tl.store(values + ((row * heads_k + head - heads - heads_k) * room + position) * size + column, value, inside)

    @triton.jit
    def _add_and_norm_kernel(h, came, weight, total, x, epsilon, size: tl.constexpr, padded: tl.constexpr):
        row, column = tl.program_id(0), tl.arange(0, padded)
        inside = column < size
        kind = h.dtype.element_ty
        value = tl.load(h + row * size + column, inside, 0.0).to(tl.float32)
        value = (value + tl.load(came + row * size + column, inside, 0.0).to(tl.float32)).to(kind)
        tl.store(total + row * size + column, value, inside)
        value = value.to(tl.float32)
        normal = (value * tl.rsqrt(tl.sum(value * value, 0) / size + epsilon)).to(kind)
        tl.store(x + row * size + column, normal * tl.load(weight + column, inside, 0.0), inside)

    @triton.jit
    def _gated_kernel(gates, y, columns: tl.constexpr, block_columns: tl.constexpr):
        row, column = tl.program_id(0), tl.program_id(1) * block_columns + tl.arange(0, block_columns)
        inside = column < columns
        kind = y.dtype.element_ty
        gate = tl.load(gates + row * 2 * columns + column, inside, 0.0).to(tl.float32)
        up = tl.load(gates + row * 2 * columns + columns + column, inside, 0.0).to(tl.float32)
        tl.store(y + row * columns + column, ((gate * tl.sigmoid(gate)).to(kind).to(tl.float32) * up).to(kind), inside)
