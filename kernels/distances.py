"""Products to distances, and gradients of distances to slopes, inside a kernel: as `tileloss.tiled.distance` has them.

A slope is the gradient of a product. What rounding makes of the distance between equal rows counts as zero, and a
Euclidean distance of zero has gradient zero. A distance is the same to the last bit wherever a kernel computes it
again: no sum in it can be contracted with a product that rounds.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tileloss.metrics import ROUNDING

DISTANCE_CODES = {"euclidean": 0, "squared_euclidean": 1, "cosine": 2}
EUCLIDEAN = tl.constexpr(DISTANCE_CODES["euclidean"])
COSINE = tl.constexpr(DISTANCE_CODES["cosine"])
# of the left row's squared norm alone: where two rows nearly meet, so do their norms
FLUSHED = tl.constexpr(2 * ROUNDING * torch.finfo(torch.float32).eps)

LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def to_distance(product, left_square, right_square, DISTANCE: tl.constexpr):
    """The distance of a row on the left, one number, to rows on the right; `product` and `right_square` fit."""
    if DISTANCE == COSINE:
        return 1.0 - product
    square = (right_square - 2.0 * product) + left_square
    # capped, so that an infinite distance is not below it; the one number is, for want of registers
    square = tl.where(square <= tl.minimum(left_square * FLUSHED, LARGEST), 0.0, square)
    if DISTANCE == EUCLIDEAN:
        return tl.sqrt_rn(square)
    return square


@triton.jit
def to_slope(gradient, distance, DISTANCE: tl.constexpr):
    """The gradient of a distance to that of its product."""
    if DISTANCE == COSINE:
        return -gradient
    if DISTANCE == EUCLIDEAN:
        return tl.where(distance == 0.0, 0.0, -gradient / distance)
    return -2.0 * gradient


@triton.jit
def squared_norms(squares_ptr, rows, there, DISTANCE: tl.constexpr):
    """The squared norms of some rows, of which the cosine distance has no need."""
    if DISTANCE == COSINE:
        return tl.zeros_like(rows).to(tl.float32)
    return tl.load(squares_ptr + rows, mask=there, other=0.0)
