"""Float32 in two float16 halves, for GEMMs on tensor cores that are as exact as float32: where it pays, and the split.

What the halves are for is in `tileloss.tiled.halves`. The split is elementwise, one program a part of a row.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tileloss.backend import interpreting
from tileloss.kernels.launch import launch
from tileloss.tiled.halves import LOW_SCALE

# GPUs whose tensor cores sum float16 products in float32 at eight times the rate of float32 or more: A100, Hopper and
# Blackwell for data centres. Others have twice the rate, which three products eat up
_CAPABILITIES = ((8, 0), (9, 0), (10, 0), (10, 3))
# of a product's multiplications: below, starting the additional kernels takes longer than they save
_FEWEST_MULTIPLICATIONS = 2**35
# float16 numbers whose rows tensor cores read at full speed come in multiples of 16 bytes
_ALIGNMENT = 8
_BLOCK = 1024


@triton.jit
def halves_kernel(
    x_ptr,  # (R, C)
    high_ptr,  # (R, C)
    low_ptr,  # (R, C)
    x_stride,
    halves_stride,
    columns,
    LOW_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    high = x.to(tl.float16)
    low = ((x - high.to(tl.float32)) * LOW_SCALE).to(tl.float16)
    tl.store(high_ptr + row * halves_stride + column, high, mask=inside)
    tl.store(low_ptr + row * halves_stride + column, low, mask=inside)


def halves(
    x: Tensor,  # (R, C) float32, rows of any stride
) -> Tensor:  # (2, R, C) float16, with aligned rows
    """The nearest float16, and what that leaves times `LOW_SCALE`; one read, one write of the same size."""
    rows, columns = x.shape
    stride = triton.cdiv(columns, _ALIGNMENT) * _ALIGNMENT
    both = torch.empty(2, rows, stride, dtype=torch.float16, device=x.device)[:, :, :columns]
    launch(
        halves_kernel, (triton.cdiv(columns, _BLOCK), rows), x, both[0], both[1], x.stride(0), stride, columns,
        LOW_SCALE=LOW_SCALE, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return both


def pays(rows: int, columns: int, width: int, device: torch.device) -> bool:
    """Whether exact float32 products of (rows, width) with (width, columns) had better be taken in halves there."""
    if rows * columns * width < _FEWEST_MULTIPLICATIONS or width % _ALIGNMENT:
        return False
    if torch.get_float32_matmul_precision() != "highest":
        return False
    if device.type == "cuda":
        return not torch.version.hip and torch.cuda.get_device_capability(device) in _CAPABILITIES
    return interpreting()
