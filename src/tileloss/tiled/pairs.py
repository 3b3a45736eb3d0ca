"""Similarities and distances row by row, over row blocks that stay in the cache, with gradients by hand.

Every measure is a sum over the width. Its terms are made in a block of scratch memory, summed and overwritten, so that
nothing of the inputs' size is allocated. The way back needs no more than the inputs and a few numbers a row. Through a
cosine the gradient of a row is a combination of the two rows, through a distance a multiple of their difference or its
signs; both are written block by block to where they belong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tileloss.paired import DISTANCES
from tileloss.similarity import COSINE_FLOOR, NORM_FLOOR
from tileloss.tiled.rows import Rows

# clamps of the norms, and whether a norm below its clamp still has a gradient
NORM_CLAMPS = {"cosine": (NORM_FLOOR, False), "torch_cosine": (COSINE_FLOOR, True), "angle": (NORM_FLOOR, False)}

# of the scratch memory: measured on a CPU with 2 MB of second-level cache a core, and set by arithmetic on GPUs
_BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}


def paired_measure(
    a: Tensor,  # (B, D)
    others: Sequence[Tensor],  # N times (B, D)
    measure: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The measures (N, B), and what the way back needs of the norms (1 + N, B); no rows of the latter without cosines.

    As `tileloss.reference.pairs` defines them, but that "angle" has its sign.
    """
    dtype = Rows(a, *others).dtype
    found = torch.empty(len(others), len(a), dtype=dtype, device=a.device)
    norms = found.new_empty(1 + len(others) if measure in NORM_CLAMPS else 0, len(a))
    for rows, scratch in _blocks(a, dtype):
        x = a[rows].to(dtype)
        if len(norms):
            torch.linalg.vector_norm(x, dim=1, out=norms[0, rows])
        for n, other in enumerate(others):
            y = other[rows].to(dtype)
            _measure(x, y, measure, eps, scratch, found[n, rows])
            if len(norms):
                torch.linalg.vector_norm(y, dim=1, out=norms[1 + n, rows])
    if len(norms):
        clamped = norms.clamp_min(NORM_CLAMPS[measure][0])
        found.div_(clamped[0]).div_(clamped[1:])
    return found, norms


def paired_measure_backward(
    d_found: Tensor,  # (N, B)
    a: Tensor,  # (B, D)
    others: Sequence[Tensor],  # N times (B, D)
    found: Tensor,  # (N, B)
    norms: Tensor,  # (1 + N, B), or no rows
    measure: str,
    eps: float,
    needs: Sequence[bool],  # whether a, and each of the others, want a gradient
) -> list[Tensor | None]:
    """The gradients of a and of the others, each in the dtype of its matrix."""
    dtype = found.dtype
    gradients = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip((a, *others), needs, strict=True)
    ]
    cross, own = slopes(d_found, found, norms, measure)
    for rows, scratch in _blocks(a, dtype):
        x, ys = a[rows].to(dtype), [other[rows].to(dtype) for other in others]
        targets = [None if gradient is None else gradient[rows] for gradient in gradients]
        # blocks in the dtype of the sums: the gradients themselves, or where they are narrower memory beside them
        blocks = [t if t is None or t.dtype == dtype else torch.empty_like(t, dtype=dtype) for t in targets]
        if measure in DISTANCES:
            _pull_distances(x, ys, cross[:, rows, None], measure, eps, scratch, blocks)
        else:
            own_factors = None if own is None else own[:, rows, None]
            _pull_products(x, ys, cross[:, rows, None], own_factors, scratch if measure == "angle" else None, blocks)
        for target, block in zip(targets, blocks, strict=True):
            if target is not None and block is not None and block is not target:
                target.copy_(block)
    return gradients


def slopes(
    d_found: Tensor,  # (N, B)
    found: Tensor,  # (N, B)
    norms: Tensor,  # (1 + N, B), or no rows
    measure: str,
) -> tuple[Tensor, Tensor | None]:
    """By what the other row and the own row are multiplied in the gradients: (N, B), and (1 + N, B) for a, others.

    For distances the first is the factor of the rows' difference, or of its signs. Only cosines have a second.
    """
    if measure in ("dot", "manhattan"):
        return d_found, None
    if measure == "squared_euclidean":
        return d_found * 2.0, None
    if measure == "euclidean":
        return torch.where(found == 0.0, 0.0, d_found / found), None
    floor, below_has_gradient = NORM_CLAMPS[measure]
    clamped = norms.clamp_min(floor)
    along = d_found * -found
    if len(found) > 1:  # with one other matrix, a has as much of the gradient along its rows as that
        along = torch.cat([along.sum(dim=0, keepdim=True), along])
    # the derivative of a norm is the row over the norm itself
    has_gradient = norms != 0.0 if below_has_gradient else ~(norms < floor)
    own = torch.where(has_gradient, along / clamped / norms, 0.0)
    return d_found / clamped[0] / clamped[1:], own


def _blocks(a: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Row slices, each with scratch memory of its shape."""
    room = _BLOCK_BYTES.get(a.device.type, _BLOCK_BYTES["cuda"])
    step = min(max(room // (max(a.shape[1], 1) * dtype.itemsize), 1), max(len(a), 1))
    scratch = torch.empty(step, a.shape[1], dtype=dtype, device=a.device)
    for start in range(0, len(a), step):
        rows = slice(start, min(start + step, len(a)))
        yield rows, scratch[: rows.stop - start]


def _measure(
    x: Tensor,  # (R, D)
    y: Tensor,  # (R, D)
    measure: str,
    eps: float,
    scratch: Tensor,  # (R, D): is overwritten
    found: Tensor,  # (R,): is written
) -> None:
    if measure not in DISTANCES:
        torch.mul(x, turned(y, scratch) if measure == "angle" else y, out=scratch)
        torch.sum(scratch, dim=1, out=found)
        return
    torch.sub(x, y, out=scratch)
    if eps:
        scratch.add_(eps)
    if measure == "euclidean":
        torch.linalg.vector_norm(scratch, dim=1, out=found)
    else:
        torch.sum(scratch.abs_() if measure == "manhattan" else scratch.square_(), dim=1, out=found)


def turned(
    y: Tensor,  # (R, D)
    out: Tensor,  # (R, D): is written
    back: bool = False,
) -> Tensor:  # (R, D)
    """The row whose product with x is cosine plus sine of the complex x and y; `back` gives the same for x.

    The first half of a row is its real part, the second its imaginary one; of an odd row the last number of the first
    half has none.
    """
    real, imaginary = y.shape[1] - y.shape[1] // 2, y.shape[1] // 2
    sign = 1.0 if back else -1.0
    out.copy_(y)
    out[:, :imaginary].add_(y[:, real:], alpha=sign)
    out[:, real:].sub_(y[:, :imaginary], alpha=sign)
    return out


def _pull_products(
    x: Tensor,  # (R, D)
    ys: Sequence[Tensor],  # N times (R, D)
    cross: Tensor,  # (N, R, 1)
    own: Tensor | None,  # (1 + N, R, 1)
    scratch: Tensor | None,  # (R, D): is overwritten; given where rows are turned
    gradients: Sequence[Tensor | None],  # 1 + N times (R, D): are written
) -> None:
    d_x, *d_ys = gradients
    if d_x is not None:
        for place, (y, factor) in enumerate(zip(ys, cross, strict=True)):
            if scratch is not None:
                y = turned(y, scratch)
            d_x.addcmul_(y, factor) if place else torch.mul(y, factor, out=d_x)
        if own is not None:
            d_x.addcmul_(x, own[0])
    if scratch is not None and any(d_y is not None for d_y in d_ys):
        turned_x = turned(x, scratch, back=True)
    for n, d_y in enumerate(d_ys):
        if d_y is None:
            continue
        torch.mul(x if scratch is None else turned_x, cross[n], out=d_y)
        if own is not None:
            d_y.addcmul_(ys[n], own[1 + n])


def _pull_distances(
    x: Tensor,  # (R, D)
    ys: Sequence[Tensor],  # N times (R, D)
    factors: Tensor,  # (N, R, 1)
    measure: str,
    eps: float,
    scratch: Tensor,  # (R, D): is overwritten
    gradients: Sequence[Tensor | None],  # 1 + N times (R, D): are written
) -> None:
    d_x, *d_ys = gradients
    for place, (d_y, y, factor) in enumerate(zip(d_ys, ys, factors, strict=True)):
        if d_x is None and d_y is None:
            continue
        # the first gradient of x is made where it belongs, every further one is added to it
        pull = d_x if d_x is not None and place == 0 else scratch
        torch.sub(x, y, out=pull)
        if eps:
            pull.add_(eps)
        (pull.sign_() if measure == "manhattan" else pull).mul_(factor)
        if d_x is not None and place > 0:
            d_x.add_(pull)
        if d_y is not None:
            torch.neg(pull, out=d_y)
