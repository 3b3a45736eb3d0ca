"""Similarities and distances row by row, over row blocks that stay in the cache, with gradients by hand.

Every measure is a sum over the width. Its terms are made in a block of scratch memory, summed and overwritten, so that
nothing of the inputs' size is allocated. The way back needs no more than the inputs and a few numbers a row. Through a
cosine the gradient of a row is a combination of the two rows, through a distance a multiple of their difference or its
signs; both are written block by block to where they belong. A batch that is one block goes without slices and scratch
memory, whose time it would feel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tileloss.backend import device_type
from tileloss.paired import DISTANCES
from tileloss.similarity import COSINE_FLOOR, NORM_FLOOR

# clamps of the norms, and whether a norm below its clamp still has a gradient
NORM_CLAMPS = {"cosine": (NORM_FLOOR, False), "torch_cosine": (COSINE_FLOOR, True), "angle": (NORM_FLOOR, False)}

# of the scratch memory: measured on CPUs with 1 and 2 MB of second-level cache a core, and set by arithmetic on GPUs
_BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}


def paired_measure(
    a: Tensor,  # (B, D)
    others: Sequence[Tensor],  # N times (B, D)
    measure: str,
    eps: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """The measures (B,) with each of the others, and the norms (B,) of a and of these; of the latter for cosines only.

    As `tileloss.reference.pairs` defines them, but that "angle" has its sign.
    """
    matrices = [a, *others]
    dtype = sums_dtype(matrices)
    blocks = row_blocks(a, dtype)
    if len(blocks) == 1:
        return _measured(_raised(matrices, dtype), measure, eps, None)
    count = len(others) + (len(matrices) if measure in NORM_CLAMPS else 0)
    columns = list(torch.empty(count, a.shape[0], dtype=dtype, device=a.device).unbind())
    scratch = _scratch(a, dtype, blocks)
    for rows in blocks:
        found, norms = _measured(_raised([x[rows] for x in matrices], dtype), measure, eps, scratch)
        for column, part in zip(columns, found + norms, strict=True):
            column[rows] = part
    return columns[: len(others)], columns[len(others) :]


def paired_measure_backward(
    d_found: Sequence[Tensor],  # N times (B,)
    a: Tensor,  # (B, D)
    others: Sequence[Tensor],  # N times (B, D)
    found: Sequence[Tensor],  # N times (B,)
    norms: Sequence[Tensor],  # 1 + N times (B,), or none
    measure: str,
    eps: float,
    needs: Sequence[bool],  # whether a, and each of the others, want a gradient
) -> list[Tensor | None]:
    """The gradients of a and of the others, each in the dtype of its matrix."""
    dtype, matrices = found[0].dtype, [a, *others]
    cross, own = _slopes(d_found, found, norms, measure)
    cross, own = [x.unsqueeze(1) for x in cross], [x.unsqueeze(1) for x in own]
    blocks = row_blocks(a, dtype)
    if len(blocks) == 1:
        raised = _raised(matrices, dtype)
        gradients = _pulled(raised, cross, own, measure, eps, needs, [None] * len(raised), None)
        pairs = zip(gradients, matrices, strict=True)
        return [g if g is None or g.dtype == x.dtype else g.to(x.dtype) for g, x in pairs]
    gradients = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip(matrices, needs, strict=True)
    ]
    # through products and cosines, gradients are made of the matrices as they are
    scratch = _scratch(a, dtype, blocks) if measure in (*DISTANCES, "angle") else None
    for rows in blocks:
        raised = _raised([x[rows] for x in matrices], dtype)
        targets = [None if g is None else g[rows] for g in gradients]
        # where a gradient is narrower than the sums, its block is made beside it
        outs = [None if t is None or t.dtype != dtype else t for t in targets]
        factors = [x[rows] for x in cross], [x[rows] for x in own]
        room = None if scratch is None else scratch[: len(raised[0])]
        made = _pulled(raised, *factors, measure, eps, needs, outs, room)
        for target, block, out in zip(targets, made, outs, strict=True):
            if target is not None and block is not None and out is None:
                target.copy_(block)
    return gradients


def is_small_cosine(a: Tensor, b: Tensor, measure: str) -> bool:
    """Whether this is a cosine of one block whose operands are as wide as its sums; see `tileloss.tiled.cosines`."""
    return (
        measure in ("cosine", "torch_cosine")
        and a.dtype == b.dtype
        and a.dtype in (torch.float32, torch.float64)
        and a.numel() * a.element_size() <= _BLOCK_BYTES.get(device_type(a), _BLOCK_BYTES["cuda"])
    )


def sums_dtype(matrices: Sequence[Tensor]) -> torch.dtype:
    """float64 if any of the matrices is, else float32."""
    return torch.float64 if torch.float64 in [x.dtype for x in matrices] else torch.float32


def _raised(matrices: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    # small batches feel even a conversion to the same dtype
    return [x if x.dtype == dtype else x.to(dtype) for x in matrices]


def _slopes(
    d_found: Sequence[Tensor],  # N times (B,)
    found: Sequence[Tensor],  # N times (B,)
    norms: Sequence[Tensor],  # 1 + N times (B,), or none
    measure: str,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """By what the other row and the own row are multiplied in the gradients: N times (B,), and 1 + N for a and others.

    For distances the first is the factor of the rows' difference, or of its signs. Only cosines have a second.
    """
    if measure in ("dot", "manhattan"):
        return d_found, []
    if measure == "squared_euclidean":
        return [d * 2.0 for d in d_found], []
    if measure == "euclidean":
        return [(d / x).masked_fill(x == 0.0, 0.0) for d, x in zip(d_found, found, strict=True)], []
    floor, below_has_gradient = NORM_CLAMPS[measure]
    clamped = [x.clamp_min(floor) for x in norms]
    cross = [(d / clamped[0]).div_(x) for d, x in zip(d_found, clamped[1:], strict=True)]
    along = [(d * x).neg_() for d, x in zip(d_found, found, strict=True)]
    # a has as much of the gradient along its rows as all others have along theirs
    along = [along[0] if len(along) == 1 else torch.stack(along).sum(dim=0), *along]
    # the derivative of a norm is the row over the norm: of a norm without a gradient, over infinity
    least = 0.0 if below_has_gradient else floor
    over = [torch.threshold(x, least, math.inf) for x in norms]
    own = [(part / x).div_(y) for part, x, y in zip(along, clamped, over, strict=True)]
    return cross, own


def row_blocks(a: Tensor, dtype: torch.dtype) -> list[slice]:
    """The rows of a matrix, as many at a time as fit a block."""
    room = _BLOCK_BYTES.get(device_type(a), _BLOCK_BYTES["cuda"])
    rows, width = a.shape
    step = max(room // (max(width, 1) * dtype.itemsize), 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _scratch(a: Tensor, dtype: torch.dtype, blocks: Sequence[slice]) -> Tensor:
    return torch.empty(blocks[0].stop, a.shape[1], dtype=dtype, device=a.device)


def _measured(
    matrices: Sequence[Tensor],  # 1 + N times (R, D)
    measure: str,
    eps: float,
    scratch: Tensor | None,  # (R, D), or more rows: is overwritten
) -> tuple[list[Tensor], list[Tensor]]:
    """As `paired_measure`, of one block."""
    x, *ys = matrices
    room = None if scratch is None else scratch[: len(x)]
    found = [_sum(x, y, measure, eps, room) for y in ys]
    if measure not in NORM_CLAMPS:
        return found, []
    norms = [torch.linalg.vector_norm(rows, dim=1) for rows in matrices]
    first, *clamped = [norm.clamp_min(NORM_CLAMPS[measure][0]) for norm in norms]
    return [total.div_(first).div_(norm) for total, norm in zip(found, clamped, strict=True)], norms


def _sum(
    x: Tensor,  # (R, D)
    y: Tensor,  # (R, D)
    measure: str,
    eps: float,
    scratch: Tensor | None,  # (R, D): is overwritten
) -> Tensor:  # (R,)
    """The sum over the width that a measure is, for cosines before the norms."""
    if measure not in DISTANCES:
        return torch.mul(x, turned(y, scratch) if measure == "angle" else y, out=scratch).sum(dim=1)
    difference = _difference(x, y, eps, scratch)
    if measure == "euclidean":
        return torch.linalg.vector_norm(difference, dim=1)
    return (difference.abs_() if measure == "manhattan" else difference.square_()).sum(dim=1)


def _difference(x: Tensor, y: Tensor, eps: float, out: Tensor | None) -> Tensor:
    difference = torch.sub(x, y, out=out)
    return difference.add_(eps) if eps else difference


def turned(
    y: Tensor,  # (R, D)
    out: Tensor | None,  # (R, D): is overwritten
    back: bool = False,
) -> Tensor:  # (R, D)
    """The row whose product with x is cosine plus sine of the complex x and y; `back` gives the same for x.

    The first half of a row is its real part, the second its imaginary one; of an odd row the last number of the first
    half has none.
    """
    real, imaginary = y.shape[1] - y.shape[1] // 2, y.shape[1] // 2
    sign = 1.0 if back else -1.0
    out = y.clone() if out is None else out.copy_(y)
    out[:, :imaginary].add_(y[:, real:], alpha=sign)
    out[:, real:].sub_(y[:, :imaginary], alpha=sign)
    return out


def _pulled(
    matrices: Sequence[Tensor],  # 1 + N times (R, D)
    cross: Sequence[Tensor],  # N times (R, 1)
    own: Sequence[Tensor],  # 1 + N times (R, 1), or none
    measure: str,
    eps: float,
    needs: Sequence[bool],
    outs: Sequence[Tensor | None],  # 1 + N times (R, D): memory for the gradients
    scratch: Tensor | None,  # (R, D): is overwritten
) -> list[Tensor | None]:
    """The gradients of one block."""
    if measure in DISTANCES:
        return _pulled_by_distances(matrices, cross, measure, eps, needs, outs, scratch)
    x, *ys = matrices
    is_angle = measure == "angle"
    gradients: list[Tensor | None] = [None] * len(matrices)
    if needs[0]:
        d_x = torch.mul(turned(ys[0], scratch) if is_angle else ys[0], cross[0], out=outs[0])
        for y, factor in zip(ys[1:], cross[1:], strict=True):
            d_x.addcmul_(turned(y, scratch) if is_angle else y, factor)
        gradients[0] = d_x.addcmul_(x, own[0]) if own else d_x
    other_x = turned(x, scratch, back=True) if is_angle and any(needs[1:]) else x
    for n, y in enumerate(ys):
        if needs[1 + n]:
            d_y = torch.mul(other_x, cross[n], out=outs[1 + n])
            gradients[1 + n] = d_y.addcmul_(y, own[1 + n]) if own else d_y
    return gradients


def _pulled_by_distances(
    matrices: Sequence[Tensor],  # 1 + N times (R, D)
    factors: Sequence[Tensor],  # N times (R, 1)
    measure: str,
    eps: float,
    needs: Sequence[bool],
    outs: Sequence[Tensor | None],  # 1 + N times (R, D): memory for the gradients
    scratch: Tensor | None,  # (R, D): is overwritten
) -> list[Tensor | None]:
    x, *ys = matrices
    gradients: list[Tensor | None] = [None] * len(matrices)
    for n, y in enumerate(ys):
        if not needs[0] and not needs[1 + n]:
            continue
        # the first part of the gradient of x is made where it belongs, every further one is added to it
        pull = _difference(x, y, eps, outs[0] if needs[0] and n == 0 else scratch)
        pull = (pull.sign_() if measure == "manhattan" else pull).mul_(factors[n])
        if needs[0]:
            gradients[0] = pull if gradients[0] is None else gradients[0].add_(pull)
        if needs[1 + n]:
            gradients[1 + n] = torch.neg(pull, out=outs[1 + n])
    return gradients
