"""A block of rows with every column of every direction: the softmax, the statistics and the logits' gradient.

One program a row, which it walks twice: an online maximum and sum, then the gradient. The second read is mostly from
the cache. The positive joins the sum last, because beside one that has won a sum keeps nothing else.

The gradient takes the place of the similarities. For 16-bit operands it takes the first half of a row's bytes, where
the next GEMM reads it with a row stride of twice the columns: writing column j there overwrites the similarity j / 2,
which this row's program has read by then and no other program reads. A barrier a step keeps fast threads from
overtaking slow ones.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tileloss.kernels.launch import launch
from tileloss.kernels.logits import (
    DIRECTION_CODES,
    DOC_TO_DOC,
    LN_2,
    LOG2_E,
    QUERY_TO_DOC,
    QUERY_TO_QUERY,
    Objective,
    candidates,
    guided_candidates,
    to_logits,
)
from tileloss.kernels.unit_rows import block_of, warps_of
from tileloss.tiled.tile import Tile


@triton.jit
def columns_of(size, docs, query_columns, DIRECTION: tl.constexpr, HAS_GUIDE: tl.constexpr):
    """How many columns a direction has: with a guide, positives meet positives alone."""
    if DIRECTION == QUERY_TO_QUERY:
        return query_columns
    if DIRECTION == DOC_TO_DOC and HAS_GUIDE:
        return size
    return docs


@triton.jit
def add_zero_logit(others):
    """log2 of 1 + 2^others, and the share of 2^others in that sum, to the last digits of small ones."""
    smaller = tl.exp2(-tl.abs(others))
    total = 1.0 + smaller
    # what rounding adds to the sum it adds to its logarithm, so that the quotient of the two is free of it
    excess = tl.where(total == 1.0, 1.0, total - 1.0)
    log_total = tl.where(total == 1.0, smaller, tl.log(total) * (smaller / excess))
    share = tl.where(others > 0.0, 1.0, smaller) / total
    return tl.maximum(others, 0.0) + log_total * LOG2_E, share


@triton.jit
def softmax_rows_fwd_kernel(
    block_ptr,  # (R, C) float32 similarities, directions side by side
    gradient_ptr,  # (R, C) in the same memory
    normaliser_ptr,  # (R,)
    positive_ptr,  # (B,)
    hardest_ptr,  # (B,)
    guide_ptr,  # (R, C) float32 similarities of the guide, where HAS_GUIDE
    threshold_ptr,  # (B,)
    ids_ptr,
    mask_ptr,
    mask_row_stride,
    mask_column_stride,
    scale_ptr,
    strength,
    size,
    docs,
    query_columns,
    block_stride,
    gradient_stride,
    start,
    unit,
    HAS_GUIDE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HARDNESS: tl.constexpr,
    DIRECTIONS: tl.constexpr,  # bit d: the columns of direction d are there
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    row = start + place
    block_row = block_ptr + place.to(tl.int64) * block_stride
    lanes = tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr)
    row_id = tl.load(ids_ptr + row) if HAS_IDS else 0
    positive = tl.load(block_row + row)
    guide_row = guide_ptr + place.to(tl.int64) * block_stride
    threshold = tl.load(threshold_ptr + row) if HAS_GUIDE else 0.0

    # finite, so that a step without candidates leaves it and the sum as they are
    peak = tl.full((), -1e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    hardest = tl.full((BLOCK,), float("-inf"), tl.float32)
    offset = 0
    for DIRECTION in tl.static_range(3):
        if (DIRECTIONS >> DIRECTION) & 1:
            width = columns_of(size, docs, query_columns, DIRECTION, HAS_GUIDE)
            for first in range(0, width, BLOCK):
                column = first + lanes
                similarity = tl.load(block_row + offset + column, mask=column < width, other=0.0)
                if HAS_GUIDE:
                    similarity = guided_candidates(
                        similarity, row, column, column < width, guide_row + offset, threshold, DIRECTION
                    )
                    if GRADIENT:  # so that the guide's block need not be read again: most of this stores nothing
                        ruled_out = (column < width) & (similarity == float("-inf"))
                        tl.store(block_row + offset + column, float("-inf"), mask=ruled_out)
                else:
                    similarity = candidates(
                        similarity, row, column, column < width, row_id, ids_ptr, mask_ptr, mask_row_stride,
                        mask_column_stride, size, docs, DIRECTION, HAS_IDS, HAS_MASK,
                    )  # fmt: skip
                logit = to_logits(similarity, positive, row, column, scale, strength, size, docs, DIRECTION, HARDNESS)
                if DIRECTION == QUERY_TO_DOC:
                    hardest = tl.maximum(hardest, tl.where(column == row, float("-inf"), similarity))
                    logit = tl.where(column == row, float("-inf"), logit)
                higher = tl.maximum(peak, tl.max(logit, 0))
                total = total * tl.exp2(peak - higher) + tl.exp2(logit - higher)
                peak = higher
            offset += width
    others = peak + tl.log2(tl.sum(total, 0))
    own = positive - positive  # the positive's logit: zero, but nan where the similarity is no finite number
    normaliser, share = add_zero_logit(others)
    normaliser += own
    tl.store(normaliser_ptr + place, normaliser * LN_2)
    tl.store(positive_ptr + row, positive)
    tl.store(hardest_ptr + row, tl.max(hardest, 0))

    if GRADIENT:
        if HAS_GUIDE:
            tl.debug_barrier()
        gradient_row = gradient_ptr + place.to(tl.int64) * gradient_stride
        offset = 0
        for DIRECTION in tl.static_range(3):
            if (DIRECTIONS >> DIRECTION) & 1:
                width = columns_of(size, docs, query_columns, DIRECTION, HAS_GUIDE)
                for first in range(0, width, BLOCK):
                    column = first + lanes
                    similarity = tl.load(block_row + offset + column, mask=column < width, other=0.0)
                    if HAS_GUIDE:
                        similarity = tl.where(column < width, similarity, float("-inf"))
                    else:
                        similarity = candidates(
                            similarity, row, column, column < width, row_id, ids_ptr, mask_ptr, mask_row_stride,
                            mask_column_stride, size, docs, DIRECTION, HAS_IDS, HAS_MASK,
                        )  # fmt: skip
                    logit = to_logits(
                        similarity, positive, row, column, scale, strength, size, docs, DIRECTION, HARDNESS
                    )
                    gradient = tl.exp2(logit - normaliser)
                    if DIRECTION == QUERY_TO_DOC:
                        gradient = tl.where(column == row, own - share, gradient)
                    gradient = (gradient * unit).to(gradient_ptr.dtype.element_ty)
                    if gradient_ptr.dtype.element_ty != tl.float32:
                        tl.debug_barrier()
                    tl.store(gradient_row + offset + column, gradient, mask=column < width)
                offset += width


def softmax_rows(
    tiles: Sequence[Tile],  # the same rows of every direction
    block: Tensor,  # (R, sum of C) float32 similarities, tile beside tile: is overwritten
    objective: Objective,
    normaliser: Tensor,  # (R,): is written
    positive: Tensor,  # (B,): the tiles' rows are written, and so in the next
    hardest: Tensor,  # (B,)
    gradient: Tensor | None,  # (R, sum of C) in the memory of the block
    unit: float,
    guide: Tensor | None = None,  # (R, sum of C) float32 similarities of the guide
    thresholds: Tensor | None = None,  # (B,)
) -> None:
    """One softmax over each row of a block: log-normalisers, statistics, and the logits' gradient times `unit`."""
    rows, columns = block.shape
    width = block_of(columns)
    written = block if gradient is None else gradient
    # with a guide, those of a batch over processes are the ones of the rows' own process
    query_columns = sum(tile.width for tile in tiles if tile.direction == "query_to_query")
    launch(
        softmax_rows_fwd_kernel, (rows,), block, written, normaliser, positive, hardest,
        block if guide is None else guide, positive if thresholds is None else thresholds, *objective.arguments,
        query_columns, block.stride(0), written.stride(0), tiles[0].start, unit, HAS_GUIDE=guide is not None,
        **objective.constants,
        DIRECTIONS=sum(1 << DIRECTION_CODES[tile.direction] for tile in tiles), GRADIENT=gradient is not None,
        BLOCK=width, num_warps=warps_of(width),
    )  # fmt: skip


def gradient_memory(
    block: Tensor,  # (R, C) float32, contiguous
    dtype: torch.dtype,
) -> Tensor:  # (R, C) in `dtype`
    """The block's own memory as its gradient's: all of it, or the first half of each row's bytes for 16 bits."""
    return block.view(dtype)[:, : block.shape[1]]
