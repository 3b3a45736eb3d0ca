"""The semi-hard negative of every positive pair in a block of rows, the hinges of those triplets, and the slopes.

One program a row. It takes the row's positives a group at a time and walks all columns once for each group, keeping
for every positive the smallest negative distance strictly above its own, and beside it the row's largest negative, for
positives that have none above. A row's slopes are zero but for its positives and the negatives chosen. Several
positives may choose the same negative: within a group the first of them adds up for all, and groups follow each other,
so every sum has one order. The sums are kept in float32 in memory of the block's size.

Time: B comparisons for every pair of one class.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from tileloss.kernels.distances import squared_norms, to_distance, to_slope
from tileloss.kernels.hinges import hinges


@triton.jit
def mine_semi_hard_fwd_kernel(
    block_ptr,  # (R, B) float32 products
    sums_ptr,  # (R, B) float32: the slopes as they add up, where GRADIENT
    slopes_ptr,  # (R, B): the sums themselves, or narrower ones in the memory of the products
    left_squares_ptr,  # (R,), and none where the distance is cosine
    right_squares_ptr,  # (B,)
    of_ptr,  # (B,) the class of each row
    order_ptr,  # (B,) rows by class
    first_ptr,  # (B,) where in the order a row's class begins
    count_ptr,  # (B,) and how many rows it has
    total_ptr,  # (B,)
    active_ptr,  # (B,) int64
    hardest_positive_ptr,  # (B,)
    hardest_negative_ptr,  # (B,)
    size,
    block_stride,
    slopes_stride,
    start,
    margin,
    DISTANCE: tl.constexpr,
    SOFT: tl.constexpr,
    GRADIENT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    NOWHERE: tl.constexpr = 2147483647
    place = tl.program_id(0).to(tl.int64)
    row = start + place
    block_row = block_ptr + place * block_stride
    sums_row = sums_ptr + place * size
    lanes = tl.arange(0, BLOCK)
    members = tl.arange(0, GROUP)
    own = tl.load(of_ptr + row)
    order_row = order_ptr + tl.load(first_ptr + row)
    count = tl.load(count_ptr + row)
    left_square = squared_norms(left_squares_ptr, place, True, DISTANCE)

    total = tl.zeros((GROUP,), tl.float32)
    active = tl.zeros((GROUP,), tl.int32)
    farthest = tl.full((GROUP,), float("-inf"), tl.float32)
    nearest = tl.full((BLOCK,), float("inf"), tl.float32)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    largest_at = tl.full((BLOCK,), NOWHERE, tl.int32)
    nans = tl.zeros((BLOCK,), tl.int32)
    for group in range(0, count, GROUP):
        fresh = tl.where(group == 0, size, 0)  # columns whose sums this sweep sets to zero
        partner = tl.load(order_row + group + members, mask=group + members < count, other=row)
        is_positive = partner != row
        partner_square = squared_norms(right_squares_ptr, partner, partner >= 0, DISTANCE)
        positive = to_distance(tl.load(block_row + partner), left_square, partner_square, DISTANCE)
        farthest = tl.maximum(farthest, tl.where(is_positive, positive, float("-inf")))

        above = tl.full((GROUP, BLOCK), float("inf"), tl.float32)
        above_at = tl.full((GROUP, BLOCK), NOWHERE, tl.int32)
        for begin in range(0, size, BLOCK):
            column = begin + lanes
            inside = column < size
            product = tl.load(block_row + column, mask=inside, other=0.0)
            right_square = squared_norms(right_squares_ptr, column, inside, DISTANCE)
            distance = to_distance(product, left_square, right_square, DISTANCE)
            is_negative = tl.load(of_ptr + column, mask=inside, other=own) != own
            nans += (is_negative & (distance != distance)).to(tl.int32)
            negative = tl.where(is_negative, distance, float("inf"))
            nearest = tl.minimum(nearest, negative)
            # strictly better, so that each lane keeps the first of equals
            larger = is_negative & (distance > largest)
            largest = tl.where(larger, distance, largest)
            largest_at = tl.where(larger, column, largest_at)
            better = (negative[None, :] > positive[:, None]) & (negative[None, :] < above)
            above = tl.where(better, negative[None, :], above)
            above_at = tl.where(better, column[None, :], above_at)
            if GRADIENT:
                tl.store(sums_row + column, tl.zeros((BLOCK,), tl.float32), mask=column < fresh)

        chosen = tl.min(above, 1)
        at = tl.min(tl.where(above == chosen[:, None], above_at, NOWHERE), 1)
        peak = tl.max(largest, 0)
        peak_at = tl.min(tl.where(largest == peak, largest_at, NOWHERE), 0)
        is_above = at != NOWHERE
        # without any negative the row's own distance, zero, takes the place
        chosen = tl.where(is_above, chosen, tl.where(peak_at != NOWHERE, peak, 0.0))
        chosen = tl.where(tl.max(nans, 0) > 0, float("nan"), chosen)
        at = tl.where(is_above, at, peak_at)
        excess = (positive - chosen) + margin
        cost, pull = hinges(excess, 0.5, SOFT)
        pull = tl.where(is_positive, pull, 0.0)
        total += tl.where(is_positive, cost, 0.0)
        counts = is_positive if SOFT else is_positive & (excess > 0.0)
        active += counts.to(tl.int32)
        if GRADIENT:
            tl.debug_barrier()  # the zeros, and the sums of the groups before, are in place
            tl.store(sums_row + partner, to_slope(pull, positive, DISTANCE), mask=is_positive)
            same = at[:, None] == at[None, :]
            # of the positives that chose one negative, the first adds up for all
            together = tl.sum(tl.where(same, pull[None, :], 0.0), 1)
            before = tl.sum((same & (members[None, :] < members[:, None])).to(tl.int32), 1)
            adds = (before == 0) & (at != NOWHERE)
            sums = sums_row + at
            sums_before = tl.load(sums, mask=adds, other=0.0)
            tl.store(sums, sums_before + to_slope(-together, chosen, DISTANCE), mask=adds)
            tl.debug_barrier()

    if GRADIENT and slopes_ptr.dtype.element_ty != tl.float32:
        slopes_row = slopes_ptr + place * slopes_stride
        for begin in range(0, size, BLOCK):
            column = begin + lanes
            found = tl.load(sums_row + column, mask=column < size, other=0.0)
            tl.store(slopes_row + column, found.to(slopes_ptr.dtype.element_ty), mask=column < size)

    tl.store(total_ptr + row, tl.sum(total, 0))
    tl.store(active_ptr + row, tl.sum(active.to(tl.int64), 0))
    tl.store(hardest_positive_ptr + row, tl.max(farthest, 0))
    tl.store(hardest_negative_ptr + row, tl.min(nearest, 0))
