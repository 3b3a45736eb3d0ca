"""The gradient of a block of logits whose normalisers are known, for both terms of the loss that an entry stands for.

Elementwise, one program a row, so that the gradient can take the place of the similarities as it does in
`softmax_rows`, 16-bit operands included.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tileloss.kernels.launch import launch
from tileloss.kernels.logits import DIRECTION_CODES, LOG2_E, QUERY_TO_DOC, Objective, candidates, to_logits
from tileloss.kernels.unit_rows import block_of, warps_of
from tileloss.tiled.tile import Tile


@triton.jit
def known_normalisers_bwd_kernel(
    block_ptr,  # (R, C) float32 similarities
    gradient_ptr,  # (R, C) in the same memory
    row_normaliser_ptr,  # (B,)
    twin_normaliser_ptr,  # (B,)
    positive_ptr,  # (B,)
    ids_ptr,
    mask_ptr,
    mask_row_stride,
    mask_column_stride,
    scale_ptr,
    strength,
    size,
    docs,
    block_stride,
    gradient_stride,
    start,
    first_column,
    last_column,
    first_twin,
    last_twin,
    partitions,
    unit,
    HAS_IDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HARDNESS: tl.constexpr,
    DIRECTION: tl.constexpr,
    TWINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    row = start + place
    block_row = block_ptr + place.to(tl.int64) * block_stride
    gradient_row = gradient_ptr + place.to(tl.int64) * gradient_stride
    lanes = tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr)
    row_id = tl.load(ids_ptr + row) if HAS_IDS else 0
    row_normaliser = tl.load(row_normaliser_ptr + row) * LOG2_E
    positive = tl.load(positive_ptr + row)

    for first in range(0, last_column - first_column, BLOCK):
        place_in_row = first + lanes
        column = first_column + place_in_row
        inside = column < last_column
        similarity = tl.load(block_row + place_in_row, mask=inside, other=0.0)
        similarity = candidates(
            similarity, row, column, inside, row_id, ids_ptr, mask_ptr, mask_row_stride, mask_column_stride,
            size, docs, DIRECTION, HAS_IDS, HAS_MASK,
        )  # fmt: skip
        if DIRECTION == QUERY_TO_DOC:
            similarity = tl.where(column == row, positive, similarity)
        logit = to_logits(similarity, positive, row, column, scale, strength, size, docs, DIRECTION, HARDNESS)
        gradient = tl.exp2(logit - row_normaliser)
        if TWINS:
            is_twin = (column >= first_twin) & (column < last_twin)
            twin_normaliser = tl.load(twin_normaliser_ptr + column, mask=is_twin, other=float("inf")) * LOG2_E
            twin_positive = tl.load(positive_ptr + column, mask=is_twin, other=0.0)
            gradient += tl.exp2((similarity - twin_positive) * (scale * LOG2_E) - twin_normaliser)
        if DIRECTION == QUERY_TO_DOC:
            gradient = tl.where(column == row, gradient - partitions, gradient)
        gradient = (gradient * unit).to(gradient_ptr.dtype.element_ty)
        if gradient_ptr.dtype.element_ty != tl.float32:
            tl.debug_barrier()
        tl.store(gradient_row + place_in_row, gradient, mask=inside)


def gradient_from_normalisers(
    tile: Tile,
    block: Tensor,  # (R, C) float32 similarities: is overwritten
    objective: Objective,
    row_normaliser: Tensor,  # (B,)
    twin_normaliser: Tensor,  # (B,)
    positive: Tensor,  # (B,)
    gradient: Tensor,  # (R, C) in the memory of the block
    partitions: int,
    unit: float,
) -> None:
    """The gradient of the logits, times the number of partitions and `unit`."""
    rows, columns = block.shape
    width = block_of(columns)
    launch(
        known_normalisers_bwd_kernel, (rows,), block, gradient, row_normaliser, twin_normaliser, positive,
        *objective.arguments, block.stride(0), gradient.stride(0), tile.start, tile.first, tile.last, *tile.twins,
        float(partitions), unit, **objective.constants, DIRECTION=DIRECTION_CODES[tile.direction],
        TWINS=tile.has_twins, BLOCK=width, num_warps=warps_of(width),
    )  # fmt: skip
