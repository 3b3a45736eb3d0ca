"""All triplets of a block of rows: the sum of their hinges, their number, and the slopes, without a cube or a sort.

One program a row. It takes the row's positives a group at a time: their distances plus the margin are thresholds that
stay in registers while the program walks all columns, where every negative is compared with the whole group. Per
threshold it counts the negatives below, per column the thresholds above; those counts are the gradients of the
distances. The counts of a column, where a row has more than one group, are carried from group to group in memory of
the block's size; the last group turns them into slopes in the memory of the products, which nobody needs any more. So
does the first where it is the only one, and then the block is read once and written once.

Time: B comparisons for every pair of one class, B^2 P in all with P rows a class, a handful of instructions each. A
sort of every row would cost B^2 log B of far slower steps: it would pay from some thousands of rows a class on.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from tileloss.kernels.distances import squared_norms, to_distance, to_slope
from tileloss.kernels.hinges import hinges
from tileloss.tiled.mining import ACTIVE

LEAST = tl.constexpr(ACTIVE)


@triton.jit
def mine_all_fwd_kernel(
    block_ptr,  # (R, B) float32 products
    slopes_ptr,  # (R, B) in the same memory, where GRADIENT
    partial_ptr,  # (R, B) float32: the columns' counts between two groups
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
    place = tl.program_id(0).to(tl.int64)
    row = start + place
    block_row = block_ptr + place * block_stride
    slopes_row = slopes_ptr + place * slopes_stride
    partial_row = partial_ptr + place * size
    lanes = tl.arange(0, BLOCK)
    members = tl.arange(0, GROUP)
    own = tl.load(of_ptr + row)
    order_row = order_ptr + tl.load(first_ptr + row)
    count = tl.load(count_ptr + row)
    left_square = squared_norms(left_squares_ptr, place, True, DISTANCE)

    total = tl.zeros((BLOCK,), tl.float32)
    active = tl.zeros((BLOCK,), tl.int32)
    farthest = tl.full((GROUP,), float("-inf"), tl.float32)
    nearest = tl.full((BLOCK,), float("inf"), tl.float32)
    for group in range(0, count, GROUP):
        # how many columns this sweep carries over from the one before, hands on to the next, and finishes
        carried = tl.where(group == 0, 0, size)
        finished = tl.where(group + GROUP >= count, size, 0)
        handed_on = size - finished
        # members of a class ascend, so what stands before the group's first has had its turn
        head = tl.load(order_row + group)
        partner = tl.load(order_row + group + members, mask=group + members < count, other=row)
        is_positive = partner != row
        partner_square = squared_norms(right_squares_ptr, partner, partner >= 0, DISTANCE)
        positive = to_distance(tl.load(block_row + partner), left_square, partner_square, DISTANCE)
        farthest = tl.maximum(farthest, tl.where(is_positive, positive, float("-inf")))
        threshold = tl.where(is_positive, positive + margin, float("-inf"))
        # all threads have read the thresholds before one of them overwrites a product, and see the partial slopes
        tl.debug_barrier()

        above = tl.zeros((GROUP, BLOCK), tl.float32)
        for begin in range(0, size, BLOCK):
            column = begin + lanes
            inside = column < size
            product = tl.load(block_row + column, mask=inside, other=0.0)
            right_square = squared_norms(right_squares_ptr, column, inside, DISTANCE)
            distance = to_distance(product, left_square, right_square, DISTANCE)
            is_negative = tl.load(of_ptr + column, mask=inside, other=own) != own
            negative = tl.where(is_negative, distance, float("inf"))
            nearest = tl.minimum(nearest, negative)
            excess = threshold[:, None] - negative[None, :]
            cost, pull = hinges(excess, 1.0, SOFT)
            total += tl.sum(cost, 0)
            if not SOFT:
                active += tl.sum((excess > LEAST).to(tl.int32), 0)
            if GRADIENT:
                above += pull
                earlier = tl.load(partial_row + column, mask=column < carried, other=0.0)
                below = earlier + tl.sum(pull, 0)
                tl.store(partial_row + column, below, mask=is_negative & (column < handed_on))
                slope = to_slope(-below, distance, DISTANCE)
                done = (column < head) & (column != row)
                slope = tl.where(is_negative, slope, tl.where(done, earlier, 0.0)).to(slopes_ptr.dtype.element_ty)
                if slopes_ptr.dtype.element_ty != tl.float32:
                    tl.debug_barrier()  # narrow slopes overwrite products of columns further left
                tl.store(slopes_row + column, slope, mask=column < finished)
        if GRADIENT:
            slope = to_slope(tl.sum(above, 1), positive, DISTANCE)
            tl.debug_barrier()  # the sweep has stored zeros in the places of this group
            tl.store(
                slopes_row + partner, slope.to(slopes_ptr.dtype.element_ty), mask=is_positive & (partner < finished)
            )
            tl.store(partial_row + partner, slope, mask=is_positive & (partner < handed_on))

    tl.store(total_ptr + row, tl.sum(total, 0))
    active_total = (count - 1) * (size - count) if SOFT else tl.sum(active.to(tl.int64), 0)
    tl.store(active_ptr + row, active_total)
    tl.store(hardest_positive_ptr + row, tl.max(farthest, 0))
    tl.store(hardest_negative_ptr + row, tl.min(nearest, 0))
