"""The way back from chosen pairs in Triton: a product with a sparse matrix that has k entries in each row.

The left gradient is a gather: one program a row. The right one would be a scatter, in an order that no two runs
share; instead the pairs are sorted by their right row, and one program for each right row and piece of the width adds
up the left rows that chose it, a few at a time and always in order. A row that nobody chose costs its program two
loads; one that everybody chose is a loop of its own, in which a few rows are in flight at once.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tileloss.kernels.launch import launch
from tileloss.kernels.unit_rows import block_of, warps_of
from tileloss.tiled.chosen_pairs import by_partner

_PIECE = 128  # columns of a program that collects
_PAIRS_AT_ONCE = 8


@triton.jit
def chosen_pairs_gather_bwd_kernel(
    weights_ptr,  # (B, K)
    partners_ptr,  # (B, K) int64
    left_ptr,  # (B, D) contiguous, and so are the next
    right_ptr,  # (C, D)
    d_left_ptr,  # (B, D): is added to
    width,
    K: tl.constexpr,
    NORMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    for first in range(0, width, BLOCK):
        columns = first + lanes
        inside = columns < width
        total = tl.zeros((BLOCK,), tl.float32)
        norms = 0.0
        for place in tl.static_range(K):
            weight = tl.load(weights_ptr + row * K + place)
            partner = tl.load(partners_ptr + row * K + place)
            total += weight * tl.load(right_ptr + partner * width + columns, mask=inside, other=0.0).to(tl.float32)
            norms += weight
        if NORMS:
            total -= norms * tl.load(left_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        d_left = d_left_ptr + row * width + columns
        tl.store(d_left, tl.load(d_left, mask=inside) + total, mask=inside)


@triton.jit
def chosen_pairs_collect_bwd_kernel(
    weights_ptr,  # (B, K)
    pairs_ptr,  # (B * K,) int64: places in the weights, sorted by partner
    bounds_ptr,  # (C + 1,) int64: where the pairs of each right row begin
    left_ptr,  # (B, D) contiguous, and so are the next
    right_ptr,  # (C, D)
    d_right_ptr,  # (C, D): is added to
    width,
    K: tl.constexpr,
    NORMS: tl.constexpr,
    PAIRS: tl.constexpr,
    PIECE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside = columns < width
    lanes = tl.arange(0, PAIRS)
    stop = tl.load(bounds_ptr + row + 1)
    total = tl.zeros((PIECE,), tl.float32)
    norms = tl.zeros((PAIRS,), tl.float32)
    for first in range(tl.load(bounds_ptr + row), stop, PAIRS):
        there = first + lanes < stop
        pairs = tl.load(pairs_ptr + first + lanes, mask=there, other=0)
        weights = tl.load(weights_ptr + pairs, mask=there, other=0.0)
        sources = left_ptr + (pairs // K * width)[:, None] + columns[None, :]
        rows = tl.load(sources, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(weights[:, None] * rows, 0)
        norms += weights
    if NORMS:
        total -= tl.sum(norms, 0) * tl.load(right_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    d_right = d_right_ptr + row * width + columns
    tl.store(d_right, tl.load(d_right, mask=inside) + total, mask=inside)


def pull_pairs(
    weights: Tensor,  # (B, k): gradients of the products, zero where there is no pair
    partners: Tensor,  # (B, k) int64: the right row of each pair, always in range
    left: Tensor,  # (B, D) contiguous prepared rows
    right: Tensor,  # (C, D) contiguous prepared rows
    d_left: Tensor | None,  # (B, D) float32, contiguous: is added to
    d_right: Tensor | None,  # (C, D) float32, contiguous: is added to
    *,
    norms: bool = False,
) -> None:
    """As `tileloss.tiled.chosen_pairs.pull_pairs`, with sums in float32 and nothing raised beforehand."""
    weights, partners = weights.float().contiguous(), partners.contiguous()
    (size, per_row), (count, width) = partners.shape, right.shape
    if d_left is not None and size:
        block = block_of(width)
        launch(
            chosen_pairs_gather_bwd_kernel, (size,), weights, partners, left, right, d_left, width,
            K=per_row, NORMS=norms, BLOCK=block, num_warps=warps_of(block),
        )  # fmt: skip
    if d_right is not None and count:
        pairs, bounds = by_partner(partners, count)
        piece = min(triton.next_power_of_2(width), _PIECE)
        launch(
            chosen_pairs_collect_bwd_kernel, (count, triton.cdiv(width, piece)), weights, pairs, bounds, left, right,
            d_right, width, K=per_row, NORMS=norms, PAIRS=_PAIRS_AT_ONCE, PIECE=piece, num_warps=1,
        )  # fmt: skip
