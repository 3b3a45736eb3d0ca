"""Similarities and distances row by row in Triton: one kernel there and one back, one program a row.

A program compares its row of one matrix with the same row of one or two others. Forward it reads them once and keeps
sums in float32; backward it reads them once and writes the gradients that are wanted, scaled already. More matrices
than two go in launches of two, between which the gradient of the first is added up in float32. Rows of complex numbers
("angle") are read at two places, the second of which comes from the cache.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tileloss.kernels.launch import launch
from tileloss.kernels.unit_rows import block_of, warps_of
from tileloss.tiled.pairs import NORM_CLAMPS


@triton.jit
def _load(row_ptr, stride, columns, inside):
    return tl.load(row_ptr + columns.to(tl.int64) * stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _turned(x, row_ptr, stride, columns, width, BACK: tl.constexpr):
    """As `tileloss.tiled.pairs.turned`: x with what stands half a row away added, or subtracted."""
    imaginary = width // 2
    real = width - imaginary
    in_second = columns >= real
    partner = tl.where(in_second, columns - real, columns + real)
    other = _load(row_ptr, stride, partner, (columns < width) & (in_second | (columns < imaginary)))
    return x + tl.where(in_second != BACK, other, -other)


@triton.jit
def _difference(x, y, inside, eps):
    return tl.where(inside, x - y + eps, 0.0)


@triton.jit
def _term(x, y, y_ptr, y_stride, columns, width, eps, MEASURE: tl.constexpr):
    """The terms whose sum is the measure, before norms and square roots."""
    if MEASURE == "manhattan":
        term = tl.abs(_difference(x, y, columns < width, eps))
    elif MEASURE == "euclidean" or MEASURE == "squared_euclidean":
        difference = _difference(x, y, columns < width, eps)
        term = difference * difference
    elif MEASURE == "angle":
        term = x * _turned(y, y_ptr, y_stride, columns, width, False)
    else:
        term = x * y
    return term


@triton.jit
def _finish(total, norm_x, norm_y, MEASURE: tl.constexpr, FLOOR: tl.constexpr):
    if FLOOR is not None:
        total = tl.div_rn(tl.div_rn(total, tl.maximum(norm_x, FLOOR)), tl.maximum(norm_y, FLOOR))
    elif MEASURE == "euclidean":
        total = tl.sqrt_rn(total)
    return total


@triton.jit
def pairs_fwd_kernel(
    a_ptr,  # (B, D), any strides, and so are the next two
    b_ptr,  # (B, D)
    c_ptr,  # (B, D): read where TWO
    found_ptr,  # (B,) of b; that of c follows
    a_norms_ptr,  # (B,): written where FLOOR, and so are the next
    norms_ptr,  # (B,) of b; those of c follow
    rows,
    width,
    a_row_stride,
    a_stride,
    b_row_stride,
    b_stride,
    c_row_stride,
    c_stride,
    eps,
    MEASURE: tl.constexpr,
    FLOOR: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    a_row, b_row, c_row = a_ptr + row * a_row_stride, b_ptr + row * b_row_stride, c_ptr + row * c_row_stride
    b_terms, c_terms = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    xx, yy, zz = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + lanes
        inside = columns < width
        x = _load(a_row, a_stride, columns, inside)
        y = _load(b_row, b_stride, columns, inside)
        b_terms += _term(x, y, b_row, b_stride, columns, width, eps, MEASURE)
        if FLOOR is not None:
            xx += x * x
            yy += y * y
        if TWO:
            z = _load(c_row, c_stride, columns, inside)
            c_terms += _term(x, z, c_row, c_stride, columns, width, eps, MEASURE)
            if FLOOR is not None:
                zz += z * z
    norm_x, norm_y = tl.sqrt_rn(tl.sum(xx, 0)), tl.sqrt_rn(tl.sum(yy, 0))
    tl.store(found_ptr + row, _finish(tl.sum(b_terms, 0), norm_x, norm_y, MEASURE, FLOOR))
    if FLOOR is not None:
        tl.store(a_norms_ptr + row, norm_x)
        tl.store(norms_ptr + row, norm_y)
    if TWO:
        norm_z = tl.sqrt_rn(tl.sum(zz, 0))
        tl.store(found_ptr + row + rows, _finish(tl.sum(c_terms, 0), norm_x, norm_z, MEASURE, FLOOR))
        if FLOOR is not None:
            tl.store(norms_ptr + row + rows, norm_z)


@triton.jit
def _own_slope(along, norm, FLOOR: tl.constexpr, BELOW: tl.constexpr):
    """By what a row is multiplied in its own gradient: the derivative of a norm is the row over the norm itself."""
    is_constant = norm <= 0.0 if BELOW else norm < FLOOR
    return tl.where(is_constant, 0.0, along / tl.maximum(norm, FLOOR) / norm)


@triton.jit
def _slopes(
    d_found_ptr, found_ptr, a_norm_ptr, norm_ptr, MEASURE: tl.constexpr, FLOOR: tl.constexpr, BELOW: tl.constexpr
):
    """As `tileloss.tiled.pairs.slopes`, for one row: the factors of the other row, and of the own rows of both."""
    cross = tl.load(d_found_ptr)
    own_x, own_y = 0.0, 0.0
    if FLOOR is not None:
        along = -cross * tl.load(found_ptr)
        norm_x, norm_y = tl.load(a_norm_ptr), tl.load(norm_ptr)
        own_x, own_y = _own_slope(along, norm_x, FLOOR, BELOW), _own_slope(along, norm_y, FLOOR, BELOW)
        cross = cross / tl.maximum(norm_x, FLOOR) / tl.maximum(norm_y, FLOOR)
    elif MEASURE == "squared_euclidean":
        cross *= 2.0
    elif MEASURE == "euclidean":
        distance = tl.load(found_ptr)
        cross = tl.where(distance == 0.0, 0.0, cross / distance)
    return cross, own_x, own_y


@triton.jit
def _pulls(
    x, y, x_ptr, x_stride, y_ptr, y_stride, columns, width, eps, cross, own_x, own_y, MEASURE: tl.constexpr
):  # fmt: skip
    """What a pair adds to the gradients of its two rows."""
    if MEASURE == "manhattan" or MEASURE == "euclidean" or MEASURE == "squared_euclidean":
        pull = _difference(x, y, columns < width, eps)
        if MEASURE == "manhattan":
            pull = tl.where(pull > 0.0, 1.0, tl.where(pull < 0.0, -1.0, 0.0))
        d_x = cross * pull
        d_y = -d_x
    elif MEASURE == "angle":
        d_x = cross * _turned(y, y_ptr, y_stride, columns, width, False) + own_x * x
        d_y = cross * _turned(x, x_ptr, x_stride, columns, width, True) + own_y * y
    elif MEASURE == "dot":
        d_x, d_y = cross * y, cross * x
    else:
        d_x, d_y = cross * y + own_x * x, cross * x + own_y * y
    return d_x, d_y


@triton.jit
def pairs_bwd_kernel(
    d_found_ptr,  # (B,) of b; that of c follows, and so it is with the next
    found_ptr,  # (B,)
    a_norms_ptr,  # (B,): read where FLOOR
    norms_ptr,  # (B,)
    a_ptr,  # (B, D), any strides, and so are the next two
    b_ptr,  # (B, D)
    c_ptr,  # (B, D): read where TWO
    d_a_ptr,  # (B, D) contiguous: added to where ADD, and so are the next two, but written
    d_b_ptr,  # (B, D)
    d_c_ptr,  # (B, D)
    rows,
    width,
    a_row_stride,
    a_stride,
    b_row_stride,
    b_stride,
    c_row_stride,
    c_stride,
    eps,
    MEASURE: tl.constexpr,
    FLOOR: tl.constexpr,
    BELOW: tl.constexpr,
    TWO: tl.constexpr,
    NEEDS_A: tl.constexpr,
    NEEDS_B: tl.constexpr,
    NEEDS_C: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    a_row, b_row, c_row = a_ptr + row * a_row_stride, b_ptr + row * b_row_stride, c_ptr + row * c_row_stride
    at_b, at_c = row, row + rows
    cross, own_x, own_y = _slopes(
        d_found_ptr + at_b, found_ptr + at_b, a_norms_ptr + row, norms_ptr + at_b, MEASURE, FLOOR, BELOW
    )
    if TWO:
        cross_c, own_xc, own_z = _slopes(
            d_found_ptr + at_c, found_ptr + at_c, a_norms_ptr + row, norms_ptr + at_c, MEASURE, FLOOR, BELOW
        )
    for first in range(0, width, BLOCK):
        columns = first + lanes
        inside = columns < width
        place = row * width + columns
        x = _load(a_row, a_stride, columns, inside)
        y = _load(b_row, b_stride, columns, inside)
        d_x, d_y = _pulls(
            x, y, a_row, a_stride, b_row, b_stride, columns, width, eps, cross, own_x, own_y, MEASURE
        )  # fmt: skip
        if NEEDS_B:
            tl.store(d_b_ptr + place, d_y.to(d_b_ptr.dtype.element_ty), mask=inside)
        if TWO:
            z = _load(c_row, c_stride, columns, inside)
            d_xc, d_z = _pulls(
                x, z, a_row, a_stride, c_row, c_stride, columns, width, eps, cross_c, own_xc, own_z, MEASURE
            )  # fmt: skip
            d_x += d_xc
            if NEEDS_C:
                tl.store(d_c_ptr + place, d_z.to(d_c_ptr.dtype.element_ty), mask=inside)
        if NEEDS_A:
            if ADD:
                d_x += tl.load(d_a_ptr + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_a_ptr + place, d_x.to(d_a_ptr.dtype.element_ty), mask=inside)


def paired_measure(
    a: Tensor,  # (B, D)
    others: Sequence[Tensor],  # N times (B, D)
    measure: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As `tileloss.tiled.pairs.paired_measure`: the measures (N, B), and norms (1 + N, B) or no rows, in float32."""
    rows, width = a.shape
    found = torch.empty(len(others), rows, dtype=torch.float32, device=a.device)
    norms = found.new_empty(1 + len(others) if measure in NORM_CLAMPS else 0, rows)
    floor, _ = NORM_CLAMPS.get(measure, (None, False))
    block = block_of(width)
    for n in range(0, len(others), 2):
        two = n + 1 < len(others)
        b, c = others[n], others[n + two]
        launch(
            pairs_fwd_kernel, (rows,), a, b, c, found[n], norms[0] if len(norms) else found,
            norms[1 + n] if len(norms) else found, rows, width, *a.stride(), *b.stride(), *c.stride(), eps,
            MEASURE=measure, FLOOR=floor, TWO=two, BLOCK=block, num_warps=warps_of(block),
        )  # fmt: skip
    return found, norms


def paired_measure_backward(
    d_found: Tensor | Sequence[Tensor],  # (N, B), or its rows
    a: Tensor,  # (B, D)
    others: Sequence[Tensor],  # N times (B, D)
    found: Tensor | Sequence[Tensor],  # (N, B), or its rows
    norms: Tensor | Sequence[Tensor],  # (1 + N, B), or its rows, or none
    measure: str,
    eps: float,
    needs: Sequence[bool],  # whether a, and each of the others, want a gradient
) -> list[Tensor | None]:
    """The gradients of a and of the others, each in the dtype of its matrix."""
    rows, width = a.shape
    d_found, found, norms = (_matrix(x).contiguous() for x in (d_found, found, norms))
    # what more than one launch adds to is added up in float32
    sums_dtype = torch.float32 if len(others) > 2 else a.dtype
    dtypes = [sums_dtype, *(x.dtype for x in others)]
    d_a, *d_others = (
        torch.empty(rows, width, dtype=dtype, device=a.device) if need else None
        for dtype, need in zip(dtypes, needs, strict=True)
    )
    floor, below = NORM_CLAMPS.get(measure, (None, False))
    block = block_of(width)
    for n in range(0, len(others), 2):
        two = n + 1 < len(others)
        b, c, d_b, d_c = others[n], others[n + two], d_others[n], d_others[n + two]
        if d_a is None and d_b is None and d_c is None:
            continue
        # where there is nothing to write, any pointer will do
        targets = [a if x is None else x for x in (d_a, d_b, d_c)]
        launch(
            pairs_bwd_kernel, (rows,), d_found[n], found[n], norms[0] if len(norms) else found,
            norms[1 + n] if len(norms) else found, a, b, c, *targets, rows, width, *a.stride(), *b.stride(),
            *c.stride(), eps, MEASURE=measure, FLOOR=floor, BELOW=below, TWO=two, NEEDS_A=d_a is not None,
            NEEDS_B=d_b is not None, NEEDS_C=two and d_c is not None, ADD=n > 0, BLOCK=block,
            num_warps=warps_of(block),
        )  # fmt: skip
    return [None if d_a is None else d_a.to(a.dtype), *d_others]


def _matrix(rows: Tensor | Sequence[Tensor]) -> Tensor:
    """As the kernels read them: one row after the other."""
    return rows if isinstance(rows, Tensor) else torch.stack(list(rows)) if len(rows) else torch.empty(0)
