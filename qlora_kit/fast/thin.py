"""A layer's work on a handful of tokens, as when an answer is written one token at a time: reading the weights is all of it.

A product with 4-bit weights unpacks them in registers and writes nothing back; it leaves sums over parts of the columns, which
the next step, whatever it is, adds up as it reads them. On a GPU with Triton each of these is one kernel; the torch form beside
it serves CPUs, other dtypes and the many tokens of a prompt, and computes the same.

Rows are tokens: x is (N, in), `parts` (p, N, out) of which the sum counts.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from qlora_kit.fast.adapters import lora_tensors
from qlora_kit.fast.layer import rms_norm
from qlora_kit.fast.nf4 import has_kernel, unpack_stacked
from qlora_kit.fast.parts import stacked_bias

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MOST_ROWS = 64  # that the product's kernel takes
PRODUCT = {"block_out": 16, "block_in": 256, "num_warps": 4}
PROGRAMS = 512  # that a product is cut into at least, so that all processors read


class Adapter(NamedTuple):
    """What LoRA adds to projections that share an input."""

    A: torch.Tensor  # (k · rank, in), times alpha / rank
    B: tuple[torch.Tensor | None, ...]  # (out_i, rank)


class Group(NamedTuple):
    """Projections that share an input."""

    weights: tuple[Any, ...]  # packed, or (out_i, in)
    bias: torch.Tensor | None
    sizes: tuple[int, ...]
    adapter: Adapter | None


def read_group(modules: list[Any], like: torch.Tensor) -> Group:
    """Projections, with LoRA or not, as they lie in memory; what LoRA adds is copied in the dtype of `like`."""
    bases = [getattr(module, "base_layer", module) for module in modules]
    pairs = [lora_tensors(module) for module in modules]
    adapter = None
    if any(pairs):
        A = [pair[0] * module.scaling[module.active_adapters[0]] for module, pair in zip(modules, pairs, strict=True) if pair]
        adapter = Adapter(torch.cat(A).to(like), tuple(None if pair is None else pair[1].to(like) for pair in pairs))
    sizes = tuple(base.out_features for base in bases)
    return Group(tuple(base.weight for base in bases), stacked_bias(bases, like), sizes, adapter)


def product(x: torch.Tensor, group: Group) -> torch.Tensor:
    """parts of x Wᵀ + (x Aᵀ) Bᵀ + bias."""
    xa = None if group.adapter is None else x @ group.adapter.A.T
    if len(x) <= MOST_ROWS and x.element_size() == 2 and all(has_kernel(weight, x.dtype) for weight in group.weights):
        return _product_in_one(x, xa, group)
    if any(hasattr(weight, "quant_state") for weight in group.weights):
        y = F.linear(x, unpack_stacked(group.weights, (None,) * len(group.sizes), 0, x.dtype))
    else:
        y = torch.cat([F.linear(x, weight) for weight in group.weights], 1)
    if group.bias is not None:
        y = y + group.bias
    if xa is not None:
        y = y + torch.cat(_updates(xa, group), 1)
    return y[None]


def _updates(xa: torch.Tensor, group: Group) -> list[torch.Tensor]:
    assert group.adapter is not None
    updates, column = [], 0
    for b, size in zip(group.adapter.B, group.sizes, strict=True):
        if b is None:
            updates.append(xa.new_zeros(len(xa), size))
        else:
            updates.append(xa[:, column : column + b.shape[1]] @ b.T)
            column += b.shape[1]
    return updates


def add_and_norm(
    h: torch.Tensor, parts: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """h plus what came, (N, hidden), and its RMS norm."""
    if _in_one(h) and parts is not None and parts.dtype == torch.float32:
        return _add_and_norm_in_one(h, parts, weight, epsilon)
    if parts is not None:
        h = h + parts.sum(0).to(h.dtype)
    return h, rms_norm(h, weight, epsilon)


def gated(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """silu(gate) · up, (N, mlp), of gate and up side by side."""
    if parts.dtype == torch.float32 and dtype != torch.float32 and _in_one(parts):
        return _gated_in_one(parts, dtype)
    gate, up = parts.sum(0).to(dtype).chunk(2, 1)
    return F.silu(gate) * up


def _in_one(x: torch.Tensor) -> bool:
    return x.is_cuda and triton is not None


def _product_in_one(x: torch.Tensor, xa: torch.Tensor | None, group: Group) -> torch.Tensor:
    out, fan_in = sum(group.sizes), x.shape[1]
    blocks_in = triton.cdiv(fan_in, PRODUCT["block_in"])
    count = min(blocks_in, triton.cdiv(PROGRAMS * PRODUCT["block_out"], out))
    count = triton.cdiv(blocks_in, triton.cdiv(blocks_in, count))  # none without work
    parts = x.new_empty(count, len(x), out, dtype=torch.float32)
    B = group.adapter.B if group.adapter else (None,) * len(group.sizes)
    first = column = 0
    for weight, b, size in zip(group.weights, B, group.sizes, strict=True):
        state = weight.quant_state
        rank = 0 if b is None else b.shape[1]
        _product_kernel[(triton.cdiv(size, PRODUCT["block_out"]), count)](
            x, weight.data, state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset,
            x if xa is None else xa, x if b is None else b, x if group.bias is None else group.bias, parts,
            len(x), size, out, first, column, triton.cdiv(blocks_in, count),
            fan_in=fan_in, width=0 if xa is None else xa.shape[1], rank=rank, padded=max(16, triton.next_power_of_2(rank)),
            has_bias=group.bias is not None, block=state.blocksize, outer_block=state.state2.blocksize,
            block_rows=max(16, triton.next_power_of_2(len(x))), enable_fp_fusion=False, **PRODUCT,
        )  # fmt: skip
        first, column = first + size, column + rank
    return parts


def _add_and_norm_in_one(
    h: torch.Tensor, parts: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total, x = torch.empty_like(h), torch.empty_like(h)
    size = h.shape[1]
    _add_and_norm_kernel[(len(h),)](
        h, parts, weight, total, x, len(h), len(parts), epsilon, size=size, padded=triton.next_power_of_2(size), num_warps=8
    )
    return total, x


def _gated_in_one(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    count, rows, columns = parts.shape
    y = parts.new_empty(rows, columns // 2, dtype=dtype)
    _gated_kernel[(rows, triton.cdiv(columns // 2, 512))](
        parts, y, rows, count, columns=columns // 2, block_columns=512, num_warps=4
    )
    return y


if triton is not None:

    @triton.jit
    def _product_kernel(
        x, data, table, absmax, outer_table, outer_absmax, offset, xa, b, bias, parts,
        rows, size, out, first, column, steps: tl.constexpr, fan_in: tl.constexpr, width: tl.constexpr, rank: tl.constexpr,
        padded: tl.constexpr, has_bias: tl.constexpr, block: tl.constexpr, outer_block: tl.constexpr,
        block_rows: tl.constexpr, block_out: tl.constexpr, block_in: tl.constexpr,
    ):  # fmt: skip
        """Of `block_out` rows of one weight and the program's share of its columns, for all tokens."""
        here = tl.program_id(0) * block_out + tl.arange(0, block_out)
        token = tl.arange(0, block_rows)[None, :]
        total = tl.zeros((block_out, block_rows), tl.float32)
        groups: tl.constexpr = block_in // block  # quantization blocks of a row at a time
        shift = tl.load(offset)
        for step in range(steps):
            start = (tl.program_id(1) * steps + step) * block_in
            # Each quantization block in a row of its own: (block_out · groups, block).
            number = (here[:, None] * fan_in + start) // block + tl.arange(0, groups)[None, :]
            inside = (here[:, None] < size) & (start + tl.arange(0, groups)[None, :] * block < fan_in)
            number, inside = tl.reshape(number, (block_out * groups,)), tl.reshape(inside, (block_out * groups,))
            inner = tl.load(absmax + number, inside, 0).to(tl.int32)
            scale = tl.load(outer_table + inner) * tl.load(outer_absmax + number // outer_block, inside, 0.0) + shift
            place = number[:, None] * (block // 2) + tl.arange(0, block // 2)[None, :]
            byte = tl.load(data + place, inside[:, None], 0).to(tl.int32)  # two values, the first in the high half
            values = tl.interleave(tl.load(table + (byte >> 4)), tl.load(table + (byte & 15))) * scale[:, None]
            values = tl.where(inside[:, None], values, 0.0)
            w = tl.reshape(values.to(x.dtype.element_ty), (block_out, block_in))
            k = start + tl.arange(0, block_in)[:, None]
            xt = tl.load(x + token * fan_in + k, (token < rows) & (k < fan_in), 0.0)  # (block_in, tokens)
            total = tl.dot(w, xt, total)
        if tl.program_id(1) == 0:
            if rank > 0:
                r = tl.arange(0, padded)
                mine = tl.load(b + here[:, None] * rank + r[None, :], (here[:, None] < size) & (r[None, :] < rank), 0.0)
                reduced = tl.load(xa + token * width + column + r[:, None], (token < rows) & (r[:, None] < rank), 0.0)
                total = tl.dot(mine.to(x.dtype.element_ty), reduced, total)
            if has_bias:
                total += tl.load(bias + first + here, here < size, 0.0).to(tl.float32)[:, None]
        target = parts + (tl.program_id(1) * rows + token) * out + first + here[:, None]
        tl.store(target, total, (here[:, None] < size) & (token < rows))

    @triton.jit
    def _add_and_norm_kernel(
        h, parts, weight, total, x, rows, count: tl.constexpr, epsilon, size: tl.constexpr, padded: tl.constexpr
    ):
        row, column = tl.program_id(0), tl.arange(0, padded)
        inside = column < size
        came = tl.zeros((padded,), tl.float32)
        for part in range(count):
            came += tl.load(parts + (part * rows + row) * size + column, inside, 0.0)
        kind = h.dtype.element_ty
        value = (tl.load(h + row * size + column, inside, 0.0).to(tl.float32) + came.to(kind).to(tl.float32)).to(kind)
        tl.store(total + row * size + column, value, inside)
        value = value.to(tl.float32)
        normal = (value * tl.rsqrt(tl.sum(value * value, 0) / size + epsilon)).to(kind)
        tl.store(x + row * size + column, normal * tl.load(weight + column, inside, 0.0), inside)

    @triton.jit
    def _gated_kernel(parts, y, rows, count: tl.constexpr, columns: tl.constexpr, block_columns: tl.constexpr):
        row, column = tl.program_id(0), tl.program_id(1) * block_columns + tl.arange(0, block_columns)
        inside = column < columns
        gate, up = tl.zeros((block_columns,), tl.float32), tl.zeros((block_columns,), tl.float32)
        for part in range(count):
            place = parts + (part * rows + row) * 2 * columns + column
            gate += tl.load(place, inside, 0.0)
            up += tl.load(place + columns, inside, 0.0)
        kind = y.dtype.element_ty
        gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)
        tl.store(y + row * columns + column, ((gate * tl.sigmoid(gate)).to(kind).to(tl.float32) * up).to(kind), inside)
