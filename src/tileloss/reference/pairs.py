"""What two matrices have in common row by row: the definition. Gradients by autograd.

A measure is either a similarity or, for the three distances, the distance itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tileloss.paired import DISTANCES, PAIRED
from tileloss.similarity import up


def paired_measure(
    a: Tensor,  # (B, D)
    others: Sequence[Tensor],  # N times (B, D)
    measure: str,
    eps: float,
) -> Tensor:  # (B, N)
    """Each row of `a` against the same row of each of `others`.

    Args:
        measure: "cosine", "torch_cosine", "dot" or "angle", which are similarities, or the distance "euclidean",
            "squared_euclidean" or "manhattan".
        eps: is added to every difference of a distance.
    """
    return torch.stack([_measure(a, b, measure, eps) for b in others], dim=1)


def _measure(a: Tensor, b: Tensor, measure: str, eps: float) -> Tensor:
    if measure not in DISTANCES:
        return PAIRED.functions[measure](a, b)
    difference = up(a) - up(b)
    if eps:
        difference = difference + eps
    if measure == "manhattan":
        return difference.abs().sum(dim=1)
    if measure == "squared_euclidean":
        return difference.square().sum(dim=1)
    return torch.linalg.vector_norm(difference, dim=1)
