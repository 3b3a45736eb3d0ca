"""Cosines of two matrices that are one block, in as few operations as there are: small batches wait for their number.

The measures and gradients are those of `tileloss.tiled.pairs`, for one other matrix, and operands as wide as the sums.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tileloss.tiled.pairs import NORM_CLAMPS


class Cosines(NamedTuple):
    """Of R rows each: the cosines, and the norms before and after their clamp, (R, 1)."""

    found: Tensor
    norms: tuple[Tensor, Tensor]
    clamped: tuple[Tensor, Tensor]


def cosines(
    a: Tensor,  # (R, D)
    b: Tensor,  # (R, D)
    measure: str,
) -> Cosines:
    """Cosine of each row of `a` with the same row of `b`."""
    norms = torch.linalg.vector_norm(a, dim=1, keepdim=True), torch.linalg.vector_norm(b, dim=1, keepdim=True)
    floor, _ = NORM_CLAMPS[measure]
    clamped = norms[0].clamp_min(floor), norms[1].clamp_min(floor)
    return Cosines((a * b).sum(dim=1, keepdim=True).div_(clamped[0]).div_(clamped[1]), norms, clamped)


def cosines_backward(
    d_found: Tensor,  # (R,)
    a: Tensor,  # (R, D)
    b: Tensor,  # (R, D)
    known: Cosines,
    measure: str,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a and of b."""
    floor, below_has_gradient = NORM_CLAMPS[measure]
    least = 0.0 if below_has_gradient else floor
    found, norms, clamped = known
    cross = (d_found.unsqueeze(1) / clamped[0]).div_(clamped[1])
    # the derivative of a norm is the row over the norm: of a norm without a gradient, over infinity
    d_a = d_b = None
    if needs[0]:
        along = (found * clamped[1]).div_(torch.threshold(norms[0], least, math.inf))
        d_a = torch.addcmul(b, a, along, value=-1).mul_(cross)
    if needs[1]:
        along = (found * clamped[0]).div_(torch.threshold(norms[1], least, math.inf))
        d_b = torch.addcmul(a, b, along, value=-1).mul_(cross)
    return d_a, d_b
