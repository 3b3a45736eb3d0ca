"""All distances or similarities between two sets of rows, one kernel: norms, product and epilogue.

A GEMM that sums its operands' squares on the way, so that its epilogue can turn a tile of products into cosines or
Euclidean distances: the rows are read once, as they are, and only the result is written. Manhattan distances have no
product; their tile is summed over the width, number by number, from transposed rows, so that loads are contiguous.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tileloss.kernels.launch import bucket, launch, shared_memory, tuned
from tileloss.kernels.normalisers import dot_precision, tile_of_program, tile_shape
from tileloss.metrics import ROUNDING
from tileloss.similarity import NORM_FLOOR, up_dtype

DOT, COSINE, EUCLIDEAN, SQUARED_EUCLIDEAN = (tl.constexpr(code) for code in range(4))
METRIC_CODES = {"dot": DOT.value, "cosine": COSINE.value, "euclidean": EUCLIDEAN.value}
METRIC_CODES["squared_euclidean"] = SQUARED_EUCLIDEAN.value

CONFIGS = [
    triton.Config({"GROUP": 8}, num_warps=8, num_stages=3),
    triton.Config({"GROUP": 8}, num_warps=8, num_stages=2),
    triton.Config({"GROUP": 8}, num_warps=8, num_stages=4),
]
MANHATTAN_CONFIGS = [triton.Config({"GROUP": 8}, num_warps=4, num_stages=stages) for stages in (3, 2)]


@triton.jit
def to_result(
    products,  # (ROWS, COLUMNS)
    left_squares,  # (ROWS,)
    right_squares,  # (COLUMNS,)
    is_itself,  # (ROWS, COLUMNS): a row compared with itself
    METRIC: tl.constexpr,
    SIMILARITY: tl.constexpr,
    ROUNDING: tl.constexpr,
    FLOOR: tl.constexpr,
):
    """Products to what the caller asked for."""
    if METRIC == DOT:
        return products if SIMILARITY else -products
    if METRIC == COSINE:
        left_norm = tl.maximum(tl.sqrt_rn(left_squares), FLOOR)
        right_norm = tl.maximum(tl.sqrt_rn(right_squares), FLOOR)
        cosine = products / left_norm[:, None] / right_norm[None, :]
        return cosine if SIMILARITY else tl.where(is_itself, 0.0, 1.0 - cosine)
    norms = left_squares[:, None] + right_squares[None, :]
    squares = norms - 2.0 * products
    squares = tl.where(is_itself | (squares <= ROUNDING * norms), 0.0, squares)
    distance = tl.sqrt_rn(squares) if METRIC == EUCLIDEAN else squares
    return -distance if SIMILARITY else distance


@tuned(CONFIGS, key=["size_bucket", "METRIC", "PRECISION"])
@triton.jit(do_not_specialize=["size_bucket"])
def pairwise_fwd_kernel(
    left_ptr,  # (N, D) contiguous
    right_ptr,  # (M, D) contiguous
    out_ptr,  # (N, M) float32
    n,
    m,
    width,
    size_bucket,
    METRIC: tl.constexpr,
    SIMILARITY: tl.constexpr,
    WITHIN: tl.constexpr,  # left and right are the same rows
    ROUNDING: tl.constexpr,
    FLOOR: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, column_tile = tile_of_program(tl.cdiv(n, ROWS), tl.cdiv(m, COLUMNS), GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    steps = tl.arange(0, DEPTH)
    # rows and columns beyond the end read the last one again, and are not stored
    left = left_ptr + tl.minimum(row, n - 1)[:, None].to(tl.int64) * width + steps[None, :]
    right = right_ptr + tl.minimum(column, m - 1)[:, None].to(tl.int64) * width + steps[None, :]
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    left_squares, right_squares = tl.zeros((ROWS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, width, DEPTH):
        there = (first + steps < width)[None, :]
        a = tl.load(left + first, mask=there, other=0.0)
        b = tl.load(right + first, mask=there, other=0.0)
        products = tl.dot(a, tl.trans(b), products, input_precision=PRECISION)
        if METRIC != DOT:
            a, b = a.to(tl.float32), b.to(tl.float32)
            left_squares += tl.sum(a * a, 1)
            right_squares += tl.sum(b * b, 1)
    is_itself = (row[:, None] == column[None, :]) if WITHIN else False
    result = to_result(products, left_squares, right_squares, is_itself, METRIC, SIMILARITY, ROUNDING, FLOOR)
    out = out_ptr + row[:, None].to(tl.int64) * m + column[None, :]
    tl.store(out, result, mask=(row < n)[:, None] & (column < m)[None, :])


@tuned(MANHATTAN_CONFIGS, key=["size_bucket"])
@triton.jit(do_not_specialize=["size_bucket"])
def manhattan_fwd_kernel(
    left_ptr,  # (D, N) contiguous
    right_ptr,  # (D, M) contiguous
    out_ptr,  # (N, M) float32
    n,
    m,
    width,
    size_bucket,
    SIMILARITY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLLED: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, column_tile = tile_of_program(tl.cdiv(n, ROWS), tl.cdiv(m, COLUMNS), GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    left, right = left_ptr + tl.minimum(row, n - 1), right_ptr + tl.minimum(column, m - 1)
    for _ in tl.range(0, width, loop_unroll_factor=UNROLLED):
        a = tl.load(left).to(tl.float32)
        b = tl.load(right).to(tl.float32)
        total += tl.abs(a[:, None] - b[None, :])
        left += n
        right += m
    out = out_ptr + row[:, None].to(tl.int64) * m + column[None, :]
    tl.store(out, -total if SIMILARITY else total, mask=(row < n)[:, None] & (column < m)[None, :])


def pairwise_matrix(
    a: Tensor,  # (N, D)
    b: Tensor | None,  # (M, D); None compares `a` with itself
    metric: str,
    similarity: bool,
) -> Tensor:  # (N, M) float32
    """As `tileloss.reference.pairwise_matrix`, on rows of 32 bits or fewer; no matrix is held beside the result."""
    left, right = as_operands(a, b)
    (n, width), m = left.shape, len(right)
    out = torch.empty(n, m, dtype=torch.float32, device=a.device)
    if metric == "manhattan":
        tile = manhattan_tile(a.device)
        left_columns = left.t().contiguous()
        right_columns = left_columns if b is None else right.t().contiguous()
        launch(
            manhattan_fwd_kernel, (triton.cdiv(n, tile.rows) * triton.cdiv(m, tile.columns),), left_columns,
            right_columns, out, n, m, width, bucket(n, m, width), SIMILARITY=similarity, ROWS=tile.rows,
            COLUMNS=tile.columns, UNROLLED=tile.unrolled,
        )  # fmt: skip
        return out
    shape = tile_shape(left)
    launch(
        pairwise_fwd_kernel, (triton.cdiv(n, shape.rows) * triton.cdiv(m, shape.columns),), left, right, out, n, m,
        width, bucket(n, m, width), METRIC=METRIC_CODES[metric], SIMILARITY=similarity, WITHIN=b is None,
        ROUNDING=ROUNDING * torch.finfo(torch.float32).eps, FLOOR=NORM_FLOOR, PRECISION=precision_of(left, metric),
        ROWS=shape.rows, COLUMNS=shape.columns, DEPTH=shape.depth,
    )  # fmt: skip
    return out


class ManhattanTile(NamedTuple):
    """Rows and columns of a tile, and how many steps of its loop are written out."""

    rows: int
    columns: int
    unrolled: int


def manhattan_tile(device: torch.device) -> ManhattanTile:
    """A tile of 32 sums a thread, for as many loads of its rows' numbers as fit the registers; small to interpret."""
    return ManhattanTile(32, 32, 4) if shared_memory(device) == 0 else ManhattanTile(64, 64, 4)


def as_operands(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows as kernels read them: contiguous, and of one dtype."""
    if b is None:
        left = a.contiguous()
        return left, left
    if a.dtype != b.dtype:
        a, b = a.to(up_dtype(a.dtype)), b.to(up_dtype(b.dtype))
    return a.contiguous(), b.contiguous()


def precision_of(operand: Tensor, metric: str) -> str:
    """As `dot_precision`; but a difference of squares would lose to tf32 the digits that it lives on.

    Three products of tf32 parts stand for one of float32 there: a third of the speed of tf32, and still several times
    that of exact multiplication.
    """
    found = dot_precision(operand)
    return "tf32x3" if found == "tf32" and "euclidean" in metric else found
