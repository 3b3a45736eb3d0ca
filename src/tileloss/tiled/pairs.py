"""Similarities and distances row by row, over row blocks that stay in the cache, with gradients by hand.

Every measure is a sum over the width. Its terms are made in a block of scratch memory, summed and overwritten, so that
nothing of the inputs' size is allocated. The way back needs no more than the inputs and a few numbers a row. Through a
cosine the gradient of a row is a combination of the two rows, through a distance a multiple of their difference or its
signs; both are written block by block to where they belong. A batch that is one block goes without slices and scratch
memory, whose time it would feel.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """The measures (N, B), and the norms (1 + N, B) of all rows; no rows of the latter unless for cosines.

    As `tileloss.reference.pairs` defines them, but that "angle" has its sign.
    """
    dtype = Rows(a, *others).dtype
    blocks = _blocks(a, dtype)
    if len(blocks) == 1:
        return _measured(a.to(dtype), [other.to(dtype) for other in others], measure, eps, None)
    found = torch.empty(len(others), a.shape[0], dtype=dtype, device=a.device)
    norms = found.new_empty(1 + len(others) if measure in NORM_CLAMPS else 0, a.shape[0])
    scratch = _scratch(a, dtype, blocks)
    for rows in blocks:
        ys = [other[rows].to(dtype) for other in others]
        found[:, rows], norms[:, rows] = _measured(a[rows].to(dtype), ys, measure, eps, scratch[: len(ys[0])])
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
    dtype, matrices = found.dtype, [a, *others]
    cross, own = slopes(d_found, found, norms, measure)
    cross, own = cross[..., None], None if own is None else own[..., None]
    blocks = _blocks(a, dtype)
    if len(blocks) == 1:
        raised = [x.to(dtype) for x in matrices]
        gradients = _pulled(raised, cross, own, measure, eps, needs, [None] * len(raised), None)
        return [None if g is None else g.to(x.dtype) for g, x in zip(gradients, matrices, strict=True)]
    gradients = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip(matrices, needs, strict=True)
    ]
    scratch = _scratch(a, dtype, blocks)
    for rows in blocks:
        raised = [x[rows].to(dtype) for x in matrices]
        targets = [None if g is None else g[rows] for g in gradients]
        # where a gradient is narrower than the sums, its block is made beside it
        outs = [None if t is None or t.dtype != dtype else t for t in targets]
        own_block = None if own is None else own[:, rows]
        made = _pulled(raised, cross[:, rows], own_block, measure, eps, needs, outs, scratch[: len(raised[0])])
        for target, block, out in zip(targets, made, outs, strict=True):
            if target is not None and block is not None and out is None:
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
        return (d_found / found).masked_fill_(found == 0.0, 0.0), None
    floor, below_has_gradient = NORM_CLAMPS[measure]
    clamped = norms.clamp_min(floor)
    along = d_found * found
    if found.shape[0] > 1:  # with one other matrix, a has as much of the gradient along its rows as that
        along = torch.cat([along.sum(dim=0, keepdim=True), along])
    # the derivative of a norm is the row over the norm itself
    own = (along / clamped).div_(norms).neg_().masked_fill_(norms == 0.0 if below_has_gradient else norms < floor, 0.0)
    return (d_found / clamped[0]).div_(clamped[1:]), own


def _blocks(a: Tensor, dtype: torch.dtype) -> list[slice]:
    room = _BLOCK_BYTES.get(a.device.type, _BLOCK_BYTES["cuda"])
    rows, width = a.shape
    step = max(room // (max(width, 1) * dtype.itemsize), 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _scratch(a: Tensor, dtype: torch.dtype, blocks: Sequence[slice]) -> Tensor:
    return torch.empty(blocks[0].stop, a.shape[1], dtype=dtype, device=a.device)


def _measured(
    x: Tensor,  # (R, D)
    ys: Sequence[Tensor],  # N times (R, D)
    measure: str,
    eps: float,
    scratch: Tensor | None,  # (R, D): is overwritten
) -> tuple[Tensor, Tensor]:
    """As `paired_measure`, of one block."""
    found = torch.stack([_sum(x, y, measure, eps, scratch) for y in ys])
    if measure not in NORM_CLAMPS:
        return found, found.new_empty(0, len(x))
    norms = torch.stack([torch.linalg.vector_norm(rows, dim=1) for rows in (x, *ys)])
    clamped = norms.clamp_min(NORM_CLAMPS[measure][0])
    return found.div_(clamped[0]).div_(clamped[1:]), norms


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
    cross: Tensor,  # (N, R, 1)
    own: Tensor | None,  # (1 + N, R, 1)
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
        gradients[0] = d_x if own is None else d_x.addcmul_(x, own[0])
    other_x = turned(x, scratch, back=True) if is_angle and any(needs[1:]) else x
    for n, y in enumerate(ys):
        if needs[1 + n]:
            d_y = torch.mul(other_x, cross[n], out=outs[1 + n])
            gradients[1 + n] = d_y if own is None else d_y.addcmul_(y, own[1 + n])
    return gradients


def _pulled_by_distances(
    matrices: Sequence[Tensor],  # 1 + N times (R, D)
    factors: Tensor,  # (N, R, 1)
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
