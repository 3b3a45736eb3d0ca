"""The way back from distances or similarities to one side's rows, one kernel a side.

A program owns a tile of the gradient of the rows and walks over the other side's rows: the gradient of a tile of the
matrix becomes weights in registers, and their product with the other rows is added up, so no matrix of weights exists.
Sums run in one fixed order. Compared with itself, a matrix takes both of its sides in one walk, from the gradients of
(i, j) and (j, i) together. The price: programs side by side over the width read the matrix again, from the cache.

Weights go to the tensor cores in the rows' dtype. Float16 ones are scaled row by row by a power of two that follows
the largest seen so far, because gradients of means are smaller than float16 goes.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tileloss.kernels.launch import bucket, launch, shared_memory, tuned
from tileloss.kernels.normalisers import TileShape
from tileloss.kernels.pairwise import (
    COSINE,
    DOT,
    EUCLIDEAN,
    METRIC_CODES,
    SQUARED_EUCLIDEAN,
    as_operands,
    manhattan_tile,
    precision_of,
    register_limit,
)
from tileloss.similarity import NORM_FLOOR

CONFIGS = [triton.Config({}, num_warps=8, num_stages=stages) for stages in (3, 2, 4)]


@triton.jit
def load_gradient(
    grad_ptr,
    row,  # (ROWS,)
    other,  # (OTHERS,)
    n,
    m,
    row_stride,
    other_stride,
    WITHIN: tl.constexpr,
):
    """A tile of the matrix's gradient, (ROWS, OTHERS) float32, zero outside; of both places where rows are others."""
    row, other = row[:, None].to(tl.int64), other[None, :].to(tl.int64)
    inside = (row < n) & (other < m)
    grad = tl.load(grad_ptr + row * row_stride + other * other_stride, mask=inside, other=0.0).to(tl.float32)
    if WITHIN:
        twin = tl.load(grad_ptr + other * row_stride + row * other_stride, mask=inside, other=0.0)
        grad += twin.to(tl.float32)
    return grad


@triton.jit
def power_of_two_over(peak):
    """2^12 over the largest power of two in each number, so that times it the number lies in [2^12, 2^13)."""
    exponent = tl.minimum(tl.maximum((peak.to(tl.int32, bitcast=True) >> 23) & 0xFF, 13), 253)
    return ((266 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def to_weights(
    grad,  # (ROWS, OTHERS) float32
    row,  # (ROWS,)
    other,  # (OTHERS,)
    result_ptr,
    row_stride,
    other_stride,
    other_norms_ptr,  # (M,)
    n,
    m,
    METRIC: tl.constexpr,
    SIMILARITY: tl.constexpr,
    WITHIN: tl.constexpr,
    FLOOR: tl.constexpr,
):
    """What the other rows are weighted by, and each row's sum of gradient times cosine; signs come at the end."""
    along = tl.zeros(row.shape, tl.float32)
    if WITHIN and METRIC != DOT and not (METRIC == COSINE and SIMILARITY):
        grad = tl.where(row[:, None] == other[None, :], 0.0, grad)
    if METRIC == COSINE or METRIC == EUCLIDEAN:  # noqa: SIM109 (the compiler knows no `in`)
        inside = (row < n)[:, None] & (other < m)[None, :]
        place = row[:, None].to(tl.int64) * row_stride + other[None, :].to(tl.int64) * other_stride
        result = tl.load(result_ptr + place, mask=inside, other=0.0)
        if METRIC == EUCLIDEAN:
            grad = tl.where(result == 0.0, 0.0, grad / tl.abs(result))
        else:
            along = tl.sum(grad * (result if SIMILARITY else 1.0 - result), 1)
            norm = tl.load(other_norms_ptr + other, mask=other < m, other=1.0)
            grad = grad / tl.maximum(norm, FLOOR)[None, :]
    return grad, along


@triton.jit
def to_rows_gradient(
    pulled,  # (ROWS, COLUMNS): the weighted sum of the other rows
    x,  # (ROWS, COLUMNS): the rows themselves
    total,  # (ROWS,): sums of the weights
    along,  # (ROWS,)
    norm,  # (ROWS,)
    METRIC: tl.constexpr,
    SIMILARITY: tl.constexpr,
    FLOOR: tl.constexpr,
):
    """The gradient of the rows from what the walk has summed."""
    if METRIC == DOT:
        return pulled if SIMILARITY else -pulled
    if METRIC == COSINE:
        along = tl.where(norm < FLOOR, 0.0, along)  # below the floor the norm is a constant
        divisor = tl.maximum(norm, FLOOR)
        dx = (pulled - x * (along / divisor)[:, None]) / divisor[:, None]
        return dx if SIMILARITY else -dx
    dx = x * total[:, None] - pulled
    if METRIC == SQUARED_EUCLIDEAN:
        dx = 2.0 * dx
    return -dx if SIMILARITY else dx


@tuned(CONFIGS, key=["size_bucket", "METRIC", "WITHIN", "PRECISION"])
@triton.jit(do_not_specialize=["size_bucket"])
def pairwise_bwd_kernel(
    grad_ptr,  # (N, M), any strides
    result_ptr,  # (N, M), any strides
    rows_ptr,  # (N, D) contiguous
    others_ptr,  # (M, D) contiguous
    row_norms_ptr,  # (N,)
    other_norms_ptr,  # (M,)
    out_ptr,  # (N, D) contiguous
    grad_row_stride,
    grad_other_stride,
    result_row_stride,
    result_other_stride,
    n,
    m,
    width,
    size_bucket,
    METRIC: tl.constexpr,
    SIMILARITY: tl.constexpr,
    WITHIN: tl.constexpr,
    FLOOR: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # of the width
    DEPTH: tl.constexpr,  # other rows a step
):
    column_tiles = tl.cdiv(width, COLUMNS)
    row = tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    within_width = (column < width)[None, :]
    steps = tl.arange(0, DEPTH)
    dtype: tl.constexpr = others_ptr.dtype.element_ty
    pulled = tl.zeros((ROWS, COLUMNS), tl.float32)
    total, along = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    peak = tl.zeros((ROWS,), tl.float32)
    unit = power_of_two_over(peak)
    for first in range(0, m, DEPTH):
        other = first + steps
        grad = load_gradient(grad_ptr, row, other, n, m, grad_row_stride, grad_other_stride, WITHIN)
        weights, part = to_weights(
            grad, row, other, result_ptr, result_row_stride, result_other_stride, other_norms_ptr, n, m,
            METRIC, SIMILARITY, WITHIN, FLOOR,
        )  # fmt: skip
        along += part
        if dtype == tl.float16:
            peak = tl.maximum(peak, tl.max(tl.abs(weights), 1))
            smaller = power_of_two_over(peak)
            pulled *= (smaller / unit)[:, None]
            total *= smaller / unit
            unit = smaller
            weights *= unit[:, None]
        weights = weights.to(dtype)
        # as rounded, so that what a row is pulled to and away from differs by no rounding
        total += tl.sum(weights.to(tl.float32), 1)
        place = tl.minimum(other, m - 1)[:, None].to(tl.int64) * width + column[None, :]
        y = tl.load(others_ptr + place, mask=within_width, other=0.0)
        pulled = tl.dot(weights, y, pulled, input_precision=PRECISION)
    if dtype == tl.float16:
        pulled = pulled / unit[:, None]
        total = total / unit
    place = row[:, None].to(tl.int64) * width + column[None, :]
    inside = (row < n)[:, None] & within_width
    x = tl.load(rows_ptr + place, mask=inside, other=0.0).to(tl.float32)
    norm = tl.load(row_norms_ptr + row, mask=row < n, other=1.0) if METRIC == COSINE else total
    dx = to_rows_gradient(pulled, x, total, along, norm, METRIC, SIMILARITY, FLOOR)
    tl.store(out_ptr + place, dx.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def manhattan_bwd_kernel(
    grad_ptr,  # (N, M), any strides
    rows_ptr,  # (N, D) contiguous
    others_ptr,  # (M, D) contiguous
    out_ptr,  # (N, D) contiguous
    grad_row_stride,
    grad_other_stride,
    n,
    m,
    width,
    SIMILARITY: tl.constexpr,
    WITHIN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # of the width
):
    column_tiles = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    place = row[:, None] * width + column[None, :]
    inside = (row < n)[:, None] & (column < width)[None, :]
    x = tl.load(rows_ptr + place, mask=inside, other=0.0).to(tl.float32)
    dx = tl.zeros((ROWS, COLUMNS), tl.float32)
    # rows and columns beyond the end read the last one again, and are not stored
    row, column = tl.minimum(row, n - 1), tl.minimum(column, width - 1)
    others = others_ptr + column[None, :]
    grads, twins = grad_ptr + row[:, None] * grad_row_stride, grad_ptr + row[:, None] * grad_other_stride
    for _ in range(m):
        y = tl.load(others).to(tl.float32)
        grad = tl.load(grads).to(tl.float32)
        if WITHIN:
            grad += tl.load(twins).to(tl.float32)
            twins += grad_row_stride
        dx += tl.where(x > y, grad, tl.where(x < y, -grad, 0.0))
        others += width
        grads += grad_other_stride
    tl.store(out_ptr + place, (-dx if SIMILARITY else dx).to(out_ptr.dtype.element_ty), mask=inside)


def pairwise_matrix_backward(
    grad: Tensor,  # (N, M), any strides
    a: Tensor,  # (N, D)
    b: Tensor | None,  # (M, D)
    result: Tensor | None,  # (N, M): what `pairwise_matrix` returned; looked at for "euclidean" and "cosine"
    metric: str,
    similarity: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `a` and `b` in their dtypes; None for one that is not needed. No matrix is held beside them."""
    left, right = as_operands(a, b)
    norms: list[Tensor | None] = [None, None]
    if metric == "cosine":
        norms[0] = torch.linalg.vector_norm(left, dim=1, dtype=torch.float32)
        norms[1] = norms[0] if b is None else torch.linalg.vector_norm(right, dim=1, dtype=torch.float32)
    d_a = d_b = None
    if needs[0]:
        d_a = _side(grad, result, left, right, norms[0], norms[1], metric, similarity, b is None).to(a.dtype)
    if needs[1] and b is not None:
        turned = None if result is None else result.t()
        d_b = _side(grad.t(), turned, right, left, norms[1], norms[0], metric, similarity, False).to(b.dtype)
    return d_a, d_b


def _side(
    grad: Tensor,  # (N, M)
    result: Tensor | None,  # (N, M)
    rows: Tensor,  # (N, D) contiguous
    others: Tensor,  # (M, D) contiguous
    row_norms: Tensor | None,  # (N,)
    other_norms: Tensor | None,  # (M,)
    metric: str,
    similarity: bool,
    within: bool,
) -> Tensor:  # (N, D)
    """The gradient of `rows`."""
    (n, width), m = rows.shape, len(others)
    out = torch.empty_like(rows)
    if metric == "manhattan":
        tall, wide = manhattan_tile(rows.device)
        launch(
            manhattan_bwd_kernel, (triton.cdiv(n, tall) * triton.cdiv(width, wide),), grad, rows, others, out,
            *grad.stride(), n, m, width, SIMILARITY=similarity, WITHIN=within, ROWS=tall, COLUMNS=wide, num_warps=4,
        )  # fmt: skip
        return out
    shape = backward_tile_shape(rows, within)
    precision = precision_of(rows, metric)
    crowded = within and precision == "ieee" and (rows.dtype == torch.float32 or metric == "cosine")
    # what a metric does not look at still needs a pointer
    result = out if result is None else result
    launch(
        pairwise_bwd_kernel, (triton.cdiv(n, shape.rows) * triton.cdiv(width, shape.columns),), grad, result, rows,
        others, out if row_norms is None else row_norms, out if other_norms is None else other_norms, out,
        *grad.stride(), *result.stride(), n, m, width, bucket(n, m, width), METRIC=METRIC_CODES[metric],
        SIMILARITY=similarity, WITHIN=within, FLOOR=NORM_FLOOR, PRECISION=precision, ROWS=shape.rows,
        COLUMNS=shape.columns, DEPTH=shape.depth, **register_limit(168 if crowded else None),
    )  # fmt: skip
    return out


def backward_tile_shape(operand: Tensor, within: bool) -> TileShape:
    """Rows, columns of the width, and other rows a step: it loads two or three tiles of matrices and one of rows."""
    if shared_memory(operand.device) == 0:
        return TileShape(32, 64, 32)
    if operand.dtype == torch.float32:
        return TileShape(64, 128, 32 if precision_of(operand, "dot") == "tf32" else 16)
    return TileShape(64 if within else 128, 128, 32)
