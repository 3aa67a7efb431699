"""Unpack bitsandbytes' 4-bit weights into one matrix for the next product: projections stacked, their LoRA B on the right.

On a GPU with Triton one kernel unpacks in one pass what bitsandbytes unpacks in four; elsewhere, and without double quantization,
bitsandbytes unpacks. The bits are the same. NF4 and double quantization: QLoRA, arXiv 2305.14314, section 3.
"""

import functools
import math
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as bnb

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch, or a platform without Triton
    triton = None

PROGRAM_BLOCKS = 64  # quantization blocks of one program that unpacks W: 4,096 values
PROGRAM_ROWS = 64  # rows of one program that copies B


def unpack_stacked(weights: tuple[Any, ...], B: tuple[torch.Tensor | None, ...], rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Return [W | B]: the weights of projections that share an input stacked, each B_i on the right in columns of its own.

    Args:
        weights: Params4bit or plain tensors, (out_i, in).
        B: (out_i, rank) for each of them; None: not adapted.

    Returns:
        (Σ out_i, in + width), where width is k · rank of the k adapted projections, rounded up to a multiple of 8 for the matrix
        product. Outside of the B_i the right columns are zero.
    """
    shapes = [_shape(weight) for weight in weights]
    columns, width = shapes[0][1], 8 * math.ceil(rank * sum(b is not None for b in B) / 8)
    stacked = torch.empty(sum(rows for rows, _ in shapes), columns + width, dtype=dtype, device=weights[0].device)
    row = column = 0
    for weight, b, (rows, _) in zip(weights, B, shapes, strict=True):
        target = stacked[row : row + rows]
        if has_kernel(weight, dtype):
            _launch_unpack(weight, b, column, width, target)
        else:
            target[:, :columns] = _unpack(weight, dtype)
            target[:, columns:] = 0.0
            if b is not None:
                target[:, columns + column : columns + column + rank] = b
        row += rows
        column += rank * (b is not None)
    return stacked


def _shape(weight: Any) -> tuple[int, int]:
    state = getattr(weight, "quant_state", None)
    rows, columns = weight.shape if state is None else state.shape
    return rows, columns


def _unpack(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    state = getattr(weight, "quant_state", None)
    return weight if state is None else bnb.dequantize_4bit(weight.data, state).to(dtype)


def has_kernel(weight: Any, dtype: torch.dtype) -> bool:
    """Return whether Triton kernels can unpack a weight to `dtype`: 4-bit with double quantization, on a GPU."""
    state = getattr(weight, "quant_state", None)
    return state is not None and weight.is_cuda and state.nested and state.dtype == dtype and why_no_triton() is None


@functools.cache
def why_no_triton() -> str | None:
    """Return why Triton cannot compile kernels for this machine's GPU, or None; the answer comes from compiling one."""
    if triton is None:
        return "needs Triton, which this build of torch does not include"
    if not any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "gcc", "clang")):
        return "needs a C compiler: install gcc"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "needs Python.h: install your system's python3-dev"
    try:
        packed: Any
        packed, state = bnb.quantize_4bit(torch.ones(64, 64, dtype=torch.float16, device="cuda"), compress_statistics=True)
        packed.quant_state = state
        _launch_unpack(packed, None, 0, 0, torch.empty(64, 64, dtype=torch.float16, device="cuda"))
    except Exception as error:  # of Triton, of the C compiler, of the driver
        return f"Triton fails on this machine ({(str(error).strip() or repr(error)).splitlines()[-1][:120]})"
    return None


def _launch_unpack(weight: Any, b: torch.Tensor | None, column: int, width: int, out: torch.Tensor) -> None:
    state = weight.quant_state
    rows, columns = state.shape
    blocks = state.absmax.numel()
    programs = triton.cdiv(blocks, PROGRAM_BLOCKS)
    copying_B = triton.cdiv(rows, PROGRAM_ROWS) if width else 0
    _unpack_kernel[(programs + copying_B,)](
        weight.data, state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset,
        out if b is None else b, out, blocks, programs, rows, column,
        columns=columns, width=width, rank=0 if b is None else b.shape[1], block=state.blocksize,
        outer_block=state.state2.blocksize, program_blocks=PROGRAM_BLOCKS, program_rows=PROGRAM_ROWS,
        padded=triton.next_power_of_2(max(width, 1)),
        enable_fp_fusion=False,  # bitsandbytes rounds between the product and the offset
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _unpack_kernel(
        data, table, absmax, outer_table, outer_absmax, offset, b, out, blocks, programs, rows, column,
        columns: tl.constexpr, width: tl.constexpr, rank: tl.constexpr, block: tl.constexpr, outer_block: tl.constexpr,
        program_blocks: tl.constexpr, program_rows: tl.constexpr, padded: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        if program < programs:  # W
            number = program * program_blocks + tl.arange(0, program_blocks)
            inner = tl.load(absmax + number, number < blocks, 0)
            outer = tl.load(outer_absmax + number // outer_block, number < blocks, 0.0)
            scale = (tl.load(outer_table + inner.to(tl.int32)) * outer + tl.load(offset))[:, None]
            start = number[:, None] * (block // 2) + tl.arange(0, block // 2)[None, :]
            byte = tl.load(data + start, start * 2 < rows * columns, 0).to(tl.int32)  # two values, the first in the high half
            values = tl.interleave(tl.load(table + (byte >> 4)) * scale, tl.load(table + (byte & 15)) * scale)
            index = number[:, None] * block + tl.arange(0, block)[None, :]
            position = (index // columns) * (columns + width) + index % columns
            tl.store(out + position, values.to(out.dtype.element_ty), index < rows * columns)
        else:  # B, and the zeros around it
            row = (program - programs) * program_rows + tl.arange(0, program_rows)[:, None]
            right = tl.arange(0, padded)[None, :]
            inside = (right >= column) & (right < column + rank) & (row < rows)
            update = tl.load(b + row * rank + right - column, inside, 0.0)
            target = out + row * (columns + width) + columns + right
            tl.store(target, update.to(out.dtype.element_ty), (row < rows) & (right < width))
