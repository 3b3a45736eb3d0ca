"""Cosines of paired rows at several prefix widths in Triton: one program a row, one kernel each way.

Forward, a program reads its two rows once, segment by segment, and writes the running sums after each. Backward, it
takes a segment's two coefficients and writes both gradients while it reads both rows.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from tileloss.kernels.launch import launch
from tileloss.kernels.unit_rows import block_of, warps_of
from tileloss.similarity import NORM_FLOOR
from tileloss.tiled.constants import constants
from tileloss.tiled.prefix_cosines import coefficients


@triton.jit
def prefix_cosines_fwd_kernel(
    a_ptr,  # (B, D), any strides
    b_ptr,  # (B, D), any strides
    dims_ptr,  # (K,) int32, ascending
    cosine_ptr,  # (K, B)
    a_norm_ptr,  # (K, B)
    b_norm_ptr,  # (K, B)
    a_row_stride,
    a_column_stride,
    b_row_stride,
    b_column_stride,
    rows,
    widths,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    a_row, b_row = a_ptr + row * a_row_stride, b_ptr + row * b_row_stride
    aa, bb, ab = 0.0, 0.0, 0.0
    start = 0
    place = row
    for k in range(widths):
        stop = tl.load(dims_ptr + k)
        a_squares = tl.zeros((BLOCK,), tl.float32)
        b_squares = tl.zeros((BLOCK,), tl.float32)
        products = tl.zeros((BLOCK,), tl.float32)
        for first in range(start, stop, BLOCK):
            column = (first + lanes).to(tl.int64)
            a = tl.load(a_row + column * a_column_stride, mask=column < stop, other=0.0).to(tl.float32)
            b = tl.load(b_row + column * b_column_stride, mask=column < stop, other=0.0).to(tl.float32)
            a_squares += a * a
            b_squares += b * b
            products += a * b
        aa += tl.sum(a_squares, 0)
        bb += tl.sum(b_squares, 0)
        ab += tl.sum(products, 0)
        a_norm, b_norm = tl.sqrt_rn(aa), tl.sqrt_rn(bb)
        tl.store(a_norm_ptr + place, a_norm)
        tl.store(b_norm_ptr + place, b_norm)
        tl.store(cosine_ptr + place, tl.div_rn(ab, tl.maximum(a_norm, FLOOR) * tl.maximum(b_norm, FLOOR)))
        start = stop
        place += rows


@triton.jit
def prefix_cosines_bwd_kernel(
    a_ptr,  # (B, D), any strides
    b_ptr,  # (B, D), any strides
    dims_ptr,  # (K,) int32, ascending
    across_ptr,  # (K, B): of the other row's segment
    a_along_ptr,  # (K, B): of the row's own segment
    b_along_ptr,  # (K, B)
    d_a_ptr,  # (B, D) contiguous
    d_b_ptr,  # (B, D) contiguous
    a_row_stride,
    a_column_stride,
    b_row_stride,
    b_column_stride,
    rows,
    width,
    widths,
    NEEDS_A: tl.constexpr,
    NEEDS_B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    a_row, b_row = a_ptr + row * a_row_stride, b_ptr + row * b_row_stride
    start = 0
    place = row
    for k in range(widths + 1):  # beyond the longest prefix the coefficients are zero
        inside = k < widths
        stop = tl.load(dims_ptr + k, mask=inside, other=width)
        across = tl.load(across_ptr + place, mask=inside, other=0.0)
        a_along = tl.load(a_along_ptr + place, mask=inside, other=0.0)
        b_along = tl.load(b_along_ptr + place, mask=inside, other=0.0)
        for first in range(start, stop, BLOCK):
            column = (first + lanes).to(tl.int64)
            there = column < stop
            a = tl.load(a_row + column * a_column_stride, mask=there, other=0.0).to(tl.float32)
            b = tl.load(b_row + column * b_column_stride, mask=there, other=0.0).to(tl.float32)
            if NEEDS_A:
                d_a = across * b - a_along * a
                tl.store(d_a_ptr + row * width + column, d_a.to(d_a_ptr.dtype.element_ty), mask=there)
            if NEEDS_B:
                d_b = across * a - b_along * b
                tl.store(d_b_ptr + row * width + column, d_b.to(d_b_ptr.dtype.element_ty), mask=there)
        start = stop
        place += rows


def prefix_cosines(
    a: Tensor,  # (B, D), any strides
    b: Tensor,  # (B, D), any strides
    dims: Sequence[int],  # ascending, without repeats
) -> tuple[Tensor, Tensor]:
    """The cosines (K, B) and the norms (2, K, B) in float32; one read of both inputs."""
    rows, width = a.shape
    norms = torch.empty(2, len(dims), rows, dtype=torch.float32, device=a.device)
    cosines = torch.empty_like(norms[0])
    block = _block(dims, width)
    launch(
        prefix_cosines_fwd_kernel, (rows,), a, b, constants(dims, torch.int32, a.device), cosines, *norms.unbind(),
        *a.stride(), *b.stride(), rows, len(dims), FLOOR=NORM_FLOOR, BLOCK=block, num_warps=warps_of(block),
    )  # fmt: skip
    return cosines, norms


def prefix_cosines_backward(
    d_cosines: Tensor,  # (K, B)
    a: Tensor,  # (B, D), any strides
    b: Tensor,  # (B, D), any strides
    cosines: Tensor,  # (K, B)
    norms: Tensor,  # (2, K, B)
    dims: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of `a` and `b` in their own dtypes, None where unneeded; one read of both, one write of each."""
    rows, width = a.shape
    across, along = coefficients(d_cosines, cosines, norms)
    gradients = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip((a, b), needs, strict=True)
    ]
    d_a, d_b = (x if gradient is None else gradient for x, gradient in zip((a, b), gradients, strict=True))
    block = _block(dims, width)
    launch(
        prefix_cosines_bwd_kernel, (rows,), a, b, constants(dims, torch.int32, a.device), across.contiguous(),
        *along.contiguous().unbind(), d_a, d_b, *a.stride(), *b.stride(), rows, width, len(dims), NEEDS_A=needs[0],
        NEEDS_B=needs[1], BLOCK=block, num_warps=warps_of(block),
    )  # fmt: skip
    return gradients


def _block(dims: Sequence[int], width: int) -> int:
    """Lanes for the longest segment, that beyond the longest prefix included."""
    return block_of(max(last - first for first, last in pairwise((0, *dims, width))))
