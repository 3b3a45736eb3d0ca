"""Rows over their norms, and the way back.

One program a row, which it reads twice: once for a sum in float32, once to write. The second read comes from the
cache, so that the kernels move what they must and any width will do. Norms are clamped as
`torch.nn.functional.normalize` clamps them, and below the clamp they count as constants in the gradient.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tileloss.kernels.launch import as_scalar, launch
from tileloss.similarity import NORM_FLOOR

_WIDEST_BLOCK = 4096


@triton.jit
def unit_rows_fwd_kernel(
    x_ptr,  # (N, D), any strides
    unit_ptr,  # (N, D) contiguous
    norm_ptr,  # (N,)
    row_stride,
    column_stride,
    width,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    x_row = x_ptr + row * row_stride
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + lanes
        x = tl.load(x_row + columns.to(tl.int64) * column_stride, mask=columns < width, other=0.0).to(tl.float32)
        squares += x * x
    norm = tl.sqrt_rn(tl.sum(squares, 0))
    tl.store(norm_ptr + row, norm)
    divisor = tl.maximum(norm, FLOOR)
    for first in range(0, width, BLOCK):
        columns = first + lanes
        x = tl.load(x_row + columns.to(tl.int64) * column_stride, mask=columns < width, other=0.0).to(tl.float32)
        unit = tl.div_rn(x, tl.zeros((BLOCK,), tl.float32) + divisor)
        tl.store(unit_ptr + row * width + columns, unit.to(unit_ptr.dtype.element_ty), mask=columns < width)


@triton.jit
def unit_rows_bwd_kernel(
    d_unit_ptr,  # (N, D) contiguous
    unit_ptr,  # (N, D) contiguous
    norm_ptr,  # (N,)
    factor_ptr,  # 0-dim
    dx_ptr,  # (N, D) contiguous; may be the memory of d_unit
    width,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    along = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + lanes
        d_unit = tl.load(d_unit_ptr + row * width + columns, mask=columns < width, other=0.0)
        unit = tl.load(unit_ptr + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
        along += d_unit * unit
    norm = tl.load(norm_ptr + row)
    projection = tl.where(norm < FLOOR, 0.0, tl.sum(along, 0))
    factor = tl.load(factor_ptr) / tl.maximum(norm, FLOOR)
    for first in range(0, width, BLOCK):
        columns = first + lanes
        d_unit = tl.load(d_unit_ptr + row * width + columns, mask=columns < width, other=0.0)
        unit = tl.load(unit_ptr + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
        dx = (d_unit - projection * unit) * factor
        tl.store(dx_ptr + row * width + columns, dx.to(dx_ptr.dtype.element_ty), mask=columns < width)


def unit_rows(
    x: Tensor,  # (N, D), any strides
    dtype: torch.dtype,
    floor: float = NORM_FLOOR,
) -> tuple[Tensor, Tensor]:
    """The rows over their norms, (N, D) in `dtype`, and the norms (N, 1) in float32; one read of `x`, one write."""
    rows, width = x.shape
    unit = torch.empty(rows, width, dtype=dtype, device=x.device)
    norms = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = block_of(width)
    launch(
        unit_rows_fwd_kernel, (rows,), x, unit, norms, *x.stride(), width,
        FLOOR=floor, BLOCK=block, num_warps=warps_of(block),
    )  # fmt: skip
    return unit, norms


def unit_rows_backward(
    d_unit: Tensor,  # (N, D) float32: is overwritten unless `unit` is bfloat16
    unit: Tensor,  # (N, D)
    norms: Tensor,  # (N, 1)
    factor: float | Tensor,
    floor: float = NORM_FLOOR,
) -> Tensor:  # (N, D)
    """The gradient of the rows as given, times `factor`: bfloat16 for such rows, as float16 would be too narrow."""
    rows, width = unit.shape
    dx = torch.empty_like(unit) if unit.dtype == torch.bfloat16 else d_unit
    block = block_of(width)
    launch(
        unit_rows_bwd_kernel, (rows,), d_unit, unit, norms, as_scalar(factor, unit.device), dx, width,
        FLOOR=floor, BLOCK=block, num_warps=warps_of(block),
    )  # fmt: skip
    return dx


def block_of(width: int) -> int:
    """How many columns a program reads at once."""
    return min(triton.next_power_of_2(width), _WIDEST_BLOCK)


def warps_of(block: int) -> int:
    """Warps for a block of float32 lanes: two loads of 16 bytes a thread, which leaves registers for every feature."""
    return max(block // 256, 1)
