"""All distances or similarities between two sets of rows, one kernel: norms, product and epilogue.

A GEMM that sums its operands' squares on the way, so that its epilogue can turn a tile of products into cosines or
Euclidean distances: the rows are read once, as they are, and only the result is written. Manhattan distances have no
product; their tile is summed over the width, number by number, from transposed rows, so that loads are contiguous.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

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


@triton.jit
def to_result(
    products,  # (ROWS, COLUMNS)
    left_squares,  # (ROWS,)
    right_squares,  # (COLUMNS,)
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
        return cosine if SIMILARITY else 1.0 - cosine
    norms = left_squares[:, None] + right_squares[None, :]
    squares = norms - 2.0 * products
    squares = tl.where((squares <= ROUNDING * norms) & (squares < float("inf")), 0.0, squares)
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
    result = to_result(products, left_squares, right_squares, METRIC, SIMILARITY, ROUNDING, FLOOR)
    out = out_ptr + row[:, None].to(tl.int64) * m + column[None, :]
    tl.store(out, result, mask=(row < n)[:, None] & (column < m)[None, :])
    if WITHIN and METRIC != DOT and not (METRIC == COSINE and SIMILARITY):
        # rows compared with themselves, over what was stored: comparing every place would cost registers
        tl.debug_barrier()
        tl.store(out_ptr + row.to(tl.int64) * m + row, 0.0, mask=(row < n) & (row // COLUMNS == column_tile))


@triton.jit
def manhattan_fwd_kernel(
    left_ptr,  # (D, N) contiguous
    right_ptr,  # (D, M) contiguous
    out_ptr,  # (N, M) float32
    n,
    m,
    width,
    SIMILARITY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, column_tile = tile_of_program(tl.cdiv(n, ROWS), tl.cdiv(m, COLUMNS), GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    # beyond the end the last ones are read again, and not stored; as a column and a row of the tile, so that each
    # thread loads what it needs into the registers where it needs it
    left, right = left_ptr + tl.minimum(row, n - 1)[:, None], right_ptr + tl.minimum(column, m - 1)[None, :]
    for _ in range(width):
        a = tl.load(left).to(tl.float32)
        b = tl.load(right).to(tl.float32)
        total += tl.abs(a - b)
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
        rows, columns = manhattan_tile(a.device)
        left_columns = left.t().contiguous()
        right_columns = left_columns if b is None else right.t().contiguous()
        launch(
            manhattan_fwd_kernel, (triton.cdiv(n, rows) * triton.cdiv(m, columns),), left_columns, right_columns, out,
            n, m, width, SIMILARITY=similarity, ROWS=rows, COLUMNS=columns, GROUP=8, num_warps=4,
        )  # fmt: skip
        return out
    shape = tile_shape(left)
    launch(
        pairwise_fwd_kernel, (triton.cdiv(n, shape.rows) * triton.cdiv(m, shape.columns),), left, right, out, n, m,
        width, bucket(n, m, width), METRIC=METRIC_CODES[metric], SIMILARITY=similarity, WITHIN=b is None,
        ROUNDING=ROUNDING * torch.finfo(torch.float32).eps, FLOOR=NORM_FLOOR, PRECISION=precision_of(left, metric),
        ROWS=shape.rows, COLUMNS=shape.columns, DEPTH=shape.depth,
        **register_limit(255 if left.dtype == torch.float32 and b is None else None),
    )  # fmt: skip
    return out


def manhattan_tile(device: torch.device) -> tuple[int, int]:
    """Rows and columns: 32 sums a thread for the twelve numbers that it loads a step; small to interpret."""
    return (32, 32) if shared_memory(device) == 0 else (64, 64)


def register_limit(registers: int | None) -> dict[str, int]:
    """An option that lets a thread have so many: by itself the compiler would spill a few to run more threads."""
    return {} if registers is None or torch.version.hip or torch.version.xpu else {"maxnreg": registers}


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
