"""Log-sum-exps of the rows and twin columns of a matrix of products that is never stored.

A GEMM whose epilogue keeps, of each tile of similarities, the log-sum-exp of every row and of every twin column, and
the hardest negatives. A second kernel merges the tiles' parts in a fixed order: no atomics, no locks, so two runs
give the same bits. Rows are taken in bands, so that the parts stay within a few dozen megabytes whatever the batch.
Of a symmetric matrix only the tiles that reach right of the diagonal are multiplied.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tileloss.kernels.launch import bucket, launch, shared_memory, tuned
from tileloss.kernels.logits import (
    DIRECTION_CODES,
    LN_2,
    LOG2_E,
    QUERY_TO_DOC,
    Objective,
    candidates,
    to_logits,
)
from tileloss.tiled.passes import NEG_INF
from tileloss.tiled.tile import Tile

_PARTS_BYTES = 128 << 20
_MERGED_PARTS, _MERGED_COLUMNS = 32, 64

# half the register file lets two programs share a multiprocessor, one multiplying while the other exponentiates
_HALF_THE_REGISTERS = {} if torch.version.hip or torch.version.xpu else {"maxnreg": 128}
CONFIGS = [
    triton.Config({"GROUP": 8}, num_warps=8, num_stages=3),
    triton.Config({"GROUP": 8}, num_warps=8, num_stages=3, **_HALF_THE_REGISTERS),
    triton.Config({"GROUP": 8}, num_warps=8, num_stages=2),
    triton.Config({"GROUP": 8}, num_warps=8, num_stages=4),
]


class TileShape(NamedTuple):
    """Rows and columns of a tile of similarities, and the depth of one step of its product."""

    rows: int
    columns: int
    depth: int


@triton.jit
def log_sum_exp2(x, AXIS: tl.constexpr):
    """log2 of the sum of 2^x along an axis; minus infinity where every entry is."""
    peak = tl.max(x, AXIS)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    return peak + tl.log2(tl.sum(tl.exp2(x - tl.expand_dims(peak, AXIS)), AXIS))


@triton.jit
def tile_of_program(row_tiles, column_tiles, GROUP: tl.constexpr):
    """Tiles in groups of rows, column by column, so that the operands of neighbouring programs stay in the cache."""
    program = tl.program_id(0)
    group = program // (GROUP * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = program % (GROUP * column_tiles)
    return group * GROUP + within % height, within // height


@triton.jit
def relative_log_sum_exp2(similarity, positive, logit_scale, AXIS: tl.constexpr):
    """The same of similarities, scaled, less the positive's scaled one.

    Of two near similarities the difference comes first and the product then, so that no digit is lost; and the
    positive's is taken from the sum instead of every entry, which spares the registers.
    """
    peak = tl.max(similarity, AXIS)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2((similarity - tl.expand_dims(peak, AXIS)) * logit_scale), AXIS)
    return (peak - positive) * logit_scale + tl.log2(total)


@triton.jit
def add_log_sums(a, b):
    """log2 of 2^a + 2^b; minus infinity where both are."""
    peak = tl.maximum(a, b)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    return peak + tl.log2(tl.exp2(a - peak) + tl.exp2(b - peak))


@triton.jit
def keep_statistics(
    similarity,  # (ROWS, COLUMNS) products
    row,  # (ROWS,)
    column,  # (COLUMNS,)
    twin_part_ptr,  # (B,): this tile's
    positive_ptr,  # (B,)
    ids_ptr,
    mask_ptr,
    mask_row_stride,
    mask_column_stride,
    scale,
    strength,
    size,
    docs,
    stop,
    columns,
    HAS_IDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HARDNESS: tl.constexpr,
    DIRECTION: tl.constexpr,
):
    """Store the twin columns' log-sum-exps; return the rows' log-sum-exps and hardest negatives."""
    row_2d, column_2d = row[:, None], column[None, :]
    inside = (row_2d < stop) & (column_2d < columns)
    if DIRECTION != QUERY_TO_DOC:
        inside = inside & ((column_2d > row_2d) | (column_2d >= size))
    row_id = tl.load(ids_ptr + row, mask=row < stop, other=0)[:, None] if HAS_IDS else 0
    similarity = candidates(
        similarity, row_2d, column_2d, inside, row_id, ids_ptr, mask_ptr, mask_row_stride, mask_column_stride,
        size, docs, DIRECTION, HAS_IDS, HAS_MASK,
    )  # fmt: skip
    positive = tl.load(positive_ptr + row, mask=row < stop, other=0.0)
    hardest = tl.full(row.shape, float("-inf"), tl.float32)
    if DIRECTION == QUERY_TO_DOC:
        # positives join the sums last
        similarity = tl.where(row_2d == column_2d, float("-inf"), similarity)
        hardest = tl.max(similarity, 1)
    twin_positive = tl.load(positive_ptr + column, mask=column < size, other=0.0)
    twin = relative_log_sum_exp2(similarity, twin_positive, scale * LOG2_E, 0)
    tl.store(twin_part_ptr + column, twin, mask=column < size)
    if DIRECTION != QUERY_TO_DOC or HARDNESS == 0:
        normaliser = relative_log_sum_exp2(similarity, positive, scale * LOG2_E, 1)
    else:
        logit = to_logits(
            similarity, positive[:, None], row_2d, column_2d, scale, strength, size, docs, DIRECTION, HARDNESS
        )
        normaliser = log_sum_exp2(logit, 1)
    return normaliser, hardest


@tuned(CONFIGS, key=["size_bucket", "DIRECTION", "HAS_IDS", "HAS_MASK", "HARDNESS", "PRECISION"])
@triton.jit(do_not_specialize=["size_bucket"])
def normalisers_fwd_kernel(
    left_ptr,  # (B, D) contiguous
    right_ptr,  # (C, D) contiguous
    row_parts_ptr,  # (column tiles, rows of the band)
    twin_parts_ptr,  # (row tiles, B)
    hardest_parts_ptr,  # (column tiles, rows of the band)
    positive_ptr,  # (B,)
    ids_ptr,
    mask_ptr,
    mask_row_stride,
    mask_column_stride,
    scale_ptr,
    strength,
    size,
    docs,
    start,
    stop,
    columns,
    width,
    size_bucket,
    HAS_IDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HARDNESS: tl.constexpr,
    DIRECTION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, column_tile = tile_of_program(tl.cdiv(stop - start, ROWS), tl.cdiv(columns, COLUMNS), GROUP)
    row = start + row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    steps = tl.arange(0, DEPTH)
    # rows and columns beyond the end read the last one again: they are no candidates of anything
    left = left_ptr + tl.minimum(row, stop - 1)[:, None].to(tl.int64) * width + steps[None, :]
    right = right_ptr + tl.minimum(column, columns - 1)[:, None].to(tl.int64) * width + steps[None, :]
    depth = width
    if DIRECTION != QUERY_TO_DOC:
        # nothing here is right of the diagonal: no product, and all that follows is minus infinity
        depth = tl.where(tl.minimum((column_tile + 1) * COLUMNS, columns) <= start + row_tile * ROWS + 1, 0, width)
    similarity = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, depth, DEPTH):
        there = (first + steps < width)[None, :]
        a = tl.load(left + first, mask=there, other=0.0)
        b = tl.load(right + first, mask=there, other=0.0)
        similarity = tl.dot(a, tl.trans(b), similarity, input_precision=PRECISION)

    # half a tile at a time, because a whole one and its exponentials do not fit the registers
    left_half, right_half = tl.split(tl.permute(tl.reshape(similarity, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
    half = column_tile * COLUMNS + tl.arange(0, COLUMNS // 2)
    scale = tl.load(scale_ptr)
    twin_part_ptr = twin_parts_ptr + row_tile.to(tl.int64) * size
    normaliser, hardest = keep_statistics(
        left_half, row, half, twin_part_ptr, positive_ptr, ids_ptr, mask_ptr, mask_row_stride, mask_column_stride,
        scale, strength, size, docs, stop, columns, HAS_IDS, HAS_MASK, HARDNESS, DIRECTION,
    )  # fmt: skip
    right_normaliser, right_hardest = keep_statistics(
        right_half, row, half + COLUMNS // 2, twin_part_ptr, positive_ptr, ids_ptr, mask_ptr, mask_row_stride,
        mask_column_stride, scale, strength, size, docs, stop, columns, HAS_IDS, HAS_MASK, HARDNESS, DIRECTION,
    )  # fmt: skip
    part = column_tile.to(tl.int64) * (stop - start) + (row - start)
    tl.store(row_parts_ptr + part, add_log_sums(normaliser, right_normaliser), mask=row < stop)
    if DIRECTION == QUERY_TO_DOC:
        tl.store(hardest_parts_ptr + part, tl.maximum(hardest, right_hardest), mask=row < stop)


@triton.jit
def normalisers_merge_kernel(
    parts_ptr,  # (parts, width): log-sum-exps in base 2
    normaliser_ptr,  # (width,): log-sum-exps in base e, which the parts are added to
    parts,
    width,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    lanes = tl.arange(0, PARTS)
    merged = tl.load(normaliser_ptr + column, mask=column < width, other=0.0) * LOG2_E
    for first in range(0, parts, PARTS):
        part = (first + lanes)[:, None]
        there = (part < parts) & (column < width)[None, :]
        found = tl.load(parts_ptr + part.to(tl.int64) * width + column[None, :], mask=there, other=float("-inf"))
        merged = add_log_sums(merged, log_sum_exp2(found, 0))
    tl.store(normaliser_ptr + column, merged * LN_2, mask=column < width)


def fused_normalisers(
    tile: Tile,  # a whole matrix, whose first B columns are twins
    left: Tensor,  # (B, D) contiguous
    right: Tensor,  # (C, D) contiguous
    objective: Objective,
    positive: Tensor,  # (B,): similarities that logits are relative to
    hardest: Tensor,  # (B,): is written for query_to_doc
) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of the rows (B,) and of the twin columns (B,), each less its positive's logit, in float32.

    One GEMM of B x C x D, half of it for symmetric matrices. Memory: `_PARTS_BYTES` of parts, more only when a band of
    one tile's rows needs it.
    """
    size, columns = len(left), len(right)
    shape = tile_shape(left)
    rows = torch.full((size,), NEG_INF, dtype=torch.float32, device=left.device)
    twins = torch.full_like(rows, NEG_INF)
    for start in range(0, size, band := rows_per_band(size, columns, shape)):
        stop = min(start + band, size)
        row_tiles, column_tiles = triton.cdiv(stop - start, shape.rows), triton.cdiv(columns, shape.columns)
        row_parts = torch.empty(column_tiles, stop - start, dtype=torch.float32, device=left.device)
        hardest_parts = torch.empty_like(row_parts) if tile.direction == "query_to_doc" else row_parts
        twin_parts = torch.empty(row_tiles, size, dtype=torch.float32, device=left.device)
        launch(
            normalisers_fwd_kernel, (row_tiles * column_tiles,), left, right, row_parts, twin_parts, hardest_parts,
            positive, *objective.arguments, start, stop, columns, left.shape[1], bucket(size, columns, left.shape[1]),
            **objective.constants, DIRECTION=DIRECTION_CODES[tile.direction], PRECISION=dot_precision(left),
            ROWS=shape.rows, COLUMNS=shape.columns, DEPTH=shape.depth,
        )  # fmt: skip
        merge(row_parts, rows[start:stop])
        merge(twin_parts, twins)
        if tile.direction == "query_to_doc":
            torch.amax(hardest_parts, dim=0, out=hardest[start:stop])
    if tile.direction == "query_to_doc":
        own = positive - positive  # the positives' logits: zero, but nan where a similarity is no finite number
        return torch.logaddexp(rows, own), torch.logaddexp(twins, own)
    return rows, twins


def merge(
    parts: Tensor,  # (P, N) log-sum-exps in base 2
    normaliser: Tensor,  # (N,) log-sum-exps in base e: is overwritten
) -> None:
    """Add the parts, always in the same order, to the normalisers."""
    count, width = parts.shape
    launch(
        normalisers_merge_kernel, (triton.cdiv(width, _MERGED_COLUMNS),), parts, normaliser, count, width,
        PARTS=_MERGED_PARTS, COLUMNS=_MERGED_COLUMNS, num_warps=4,
    )  # fmt: skip


def tile_shape(operand: Tensor) -> TileShape:
    """The tile of a product of such operands: of the right shape for the matrix units, and no larger than fits."""
    room = shared_memory(operand.device)
    if room == 0:
        return TileShape(32, 64, 32)
    rows, depth = (128, 64)
    if operand.dtype == torch.float32:  # exact products are made in registers, which a deeper step would overflow
        rows, depth = (64, 16 if dot_precision(operand) == "ieee" else 32)
    step = (rows + 128) * depth * operand.itemsize
    return TileShape(rows, 128, depth if 3 * step <= room else depth // 2)


def rows_per_band(size: int, columns: int, shape: TileShape) -> int:
    """How many rows, in whole tiles, keep the parts within `_PARTS_BYTES`."""
    row_bytes = 4 * (2 * triton.cdiv(columns, shape.columns) + size / shape.rows)
    return max(int(_PARTS_BYTES / row_bytes) // shape.rows, 1) * shape.rows


def dot_precision(operand: Tensor) -> str:
    """How float32 operands are multiplied, as `torch.mm` on the same device would; others have no choice."""
    exact = operand.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" or torch.version.hip
    return "ieee" if exact else "tf32"
