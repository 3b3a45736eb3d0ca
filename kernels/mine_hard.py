"""The hardest triplet of every anchor in a block of rows: distances and indices, from one read of the block.

One program a row. Of equal distances the first counts, as it does for `torch.max` and `torch.min`. The gradient
reaches the chosen pairs alone, so no slopes are written.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from tileloss.kernels.distances import squared_norms, to_distance

NOWHERE = tl.constexpr(2147483647)


@triton.jit
def keep(better, distance, column, best, best_at):
    """Each lane's best distance so far and its column; `better` is strict, so that the first of equals stays."""
    return tl.where(better, distance, best), tl.where(better, column, best_at)


@triton.jit
def first_at(peak, best, best_at):
    """The first column at which a lane found the best distance of all; NOWHERE where none found any."""
    return tl.min(tl.where(best == peak, best_at, NOWHERE), 0)


@triton.jit
def mine_hard_fwd_kernel(
    block_ptr,  # (R, B) float32 products
    left_squares_ptr,  # (R,), and none where the distance is cosine
    right_squares_ptr,  # (B,)
    of_ptr,  # (B,) the class of each row
    hardest_positive_ptr,  # (B,)
    hardest_negative_ptr,  # (B,)
    positive_index_ptr,  # (B,) int64
    negative_ptr,  # (B,)
    negative_index_ptr,  # (B,) int64
    size,
    block_stride,
    start,
    DISTANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row = start + place
    block_row = block_ptr + place * block_stride
    lanes = tl.arange(0, BLOCK)
    own = tl.load(of_ptr + row)
    left_square = squared_norms(left_squares_ptr, place, True, DISTANCE)

    nowhere = tl.full((BLOCK,), NOWHERE, tl.int32)
    lowest, highest = tl.full((BLOCK,), float("-inf"), tl.float32), tl.full((BLOCK,), float("inf"), tl.float32)
    positive, positive_at = lowest, nowhere
    negative, negative_at = highest, nowhere
    other, other_at = highest, nowhere
    farthest, farthest_at = lowest, nowhere
    nans = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, size, BLOCK):
        column = begin + lanes
        inside = column < size
        product = tl.load(block_row + column, mask=inside, other=0.0)
        right_square = squared_norms(right_squares_ptr, column, inside, DISTANCE)
        distance = to_distance(product, left_square, right_square, DISTANCE)
        distance = tl.where(column == row, 0.0, distance)
        is_same = tl.load(of_ptr + column, mask=inside, other=own) == own
        nans += (inside & (distance != distance)).to(tl.int32)
        better = inside & is_same & (column != row) & (distance > positive)
        positive, positive_at = keep(better, distance, column, positive, positive_at)
        better = (is_same == 0) & (distance < negative)
        negative, negative_at = keep(better, distance, column, negative, negative_at)
        better = inside & is_same & (distance < other)
        other, other_at = keep(better, distance, column, other, other_at)
        better = inside & (distance > farthest)
        farthest, farthest_at = keep(better, distance, column, farthest, farthest_at)

    hardest = tl.max(positive, 0)
    nearest = tl.min(negative, 0)
    largest = tl.max(farthest, 0)
    least = tl.min(other, 0)
    nearest_at = first_at(nearest, negative, negative_at)
    # entries that are no negative's count with the row's largest distance on top
    raised = least + largest
    is_negative = (nearest < raised) | ((nearest == raised) & (nearest_at < first_at(least, other, other_at)))
    has_nan = tl.max(nans, 0) > 0
    chosen = tl.where(has_nan, float("nan"), tl.minimum(nearest, raised))
    chosen_at = tl.where(is_negative, nearest_at, first_at(largest, farthest, farthest_at))
    tl.store(hardest_positive_ptr + row, hardest)
    tl.store(positive_index_ptr + row, tl.where(hardest > 0.0, first_at(hardest, positive, positive_at), row))
    tl.store(negative_ptr + row, chosen)
    tl.store(negative_index_ptr + row, chosen_at.to(tl.int64))
    tl.store(hardest_negative_ptr + row, nearest)
