"""From the products of prefixes to their cosines, and what their norms answer for, in Triton.

One program a tile. Both kernels move what they must: each entry is read once and written once. Sums over rows and over
columns are kept for each tile and added up afterwards, always in the same order, without atomics.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tileloss.kernels.launch import launch
from tileloss.tiled.prefix_passes import PrefixPasses

_ROWS, _COLUMNS = 32, 128


@triton.jit
def prefix_norms_fwd_kernel(
    product_ptr,  # (R, C)
    left_ptr,  # (R,): one over the norms
    right_ptr,  # (C,)
    out_ptr,  # (R, C)
    rows,
    columns,
    product_stride,
    out_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    left = tl.load(left_ptr + row, mask=row < rows, other=0.0)
    right = tl.load(right_ptr + column, mask=column < columns, other=0.0)
    wide = row.to(tl.int64)[:, None]
    product = tl.load(product_ptr + wide * product_stride + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + wide * out_stride + column[None, :], product * right[None, :] * left[:, None], mask=inside)


@triton.jit
def prefix_norms_bwd_kernel(
    grad_ptr,  # (R, C): is divided by the norms of the right
    product_ptr,  # (R, C)
    left_ptr,  # (R,): one over the norms
    right_ptr,  # (C,)
    row_parts_ptr,  # (column tiles, R)
    column_parts_ptr,  # (row tiles, C)
    rows,
    columns,
    grad_stride,
    product_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row_tile, column_tile = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    left = tl.load(left_ptr + row, mask=row < rows, other=0.0)
    right = tl.load(right_ptr + column, mask=column < columns, other=0.0)
    grad_place = grad_ptr + row[:, None] * grad_stride + column[None, :]
    grad = tl.load(grad_place, mask=inside, other=0.0) * right[None, :]
    tl.store(grad_place, grad, mask=inside)
    product = tl.load(product_ptr + row[:, None] * product_stride + column[None, :], mask=inside, other=0.0)
    terms = grad * product * left[:, None]
    tl.store(row_parts_ptr + column_tile * rows + row, tl.sum(terms, 1), mask=row < rows)
    tl.store(column_parts_ptr + row_tile * columns + column, tl.sum(terms, 0), mask=column < columns)


class TritonPrefixPasses(PrefixPasses):
    """One kernel a pass."""

    def cosines(self, product: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
        rows, columns = product.shape
        launch(
            prefix_norms_fwd_kernel, _grid(rows, columns), product, left, right, out, rows, columns,
            product.stride(0), out.stride(0), ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip

    def answers(self, grad: Tensor, product: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = product.shape
        grid = _grid(rows, columns)
        row_parts = torch.empty(grid[0], rows, dtype=torch.float32, device=grad.device)
        column_parts = torch.empty(grid[1], columns, dtype=torch.float32, device=grad.device)
        launch(
            prefix_norms_bwd_kernel, grid, grad, product, left, right, row_parts, column_parts, rows, columns,
            grad.stride(0), product.stride(0), ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip
        return row_parts.sum(dim=0), column_parts.sum(dim=0)


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(columns, _COLUMNS), triton.cdiv(rows, _ROWS)
