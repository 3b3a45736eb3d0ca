"""What two matrices have in common row by row: the definition. Gradients by autograd.

A measure is a similarity or, for the three distances, the distance itself; "angle" has its sign.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tileloss.paired import DISTANCES, PAIRED, signed_angle
from tileloss.similarity import up


def paired_measure(
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D), or N of them stacked, (N, B, D)
    measure: str,
    eps: float,
) -> Tensor:  # (B,) or (N, B)
    """Each row of `a` against the same row of `b`, or of each of several matrices.

    Args:
        measure: "cosine", "torch_cosine", "dot" or "angle", or the distance "euclidean", "squared_euclidean" or
            "manhattan".
        eps: is added to every difference of a distance.
    """
    if measure == "angle":
        return signed_angle(a, b)
    if measure not in DISTANCES:
        return PAIRED.functions[measure](a, b)
    a, b = up(a), up(b)
    if measure == "squared_euclidean":  # in fewer operations than a difference and its square
        dtype = torch.promote_types(a.dtype, b.dtype)  # torch 2.11 has no gradients for two
        a, b = a.to(dtype).expand_as(b), b.to(dtype)
        return F.mse_loss(a + eps if eps else a, b, reduction="none").sum(dim=-1)
    difference = a - b
    if eps:
        difference = difference + eps
    if measure == "manhattan":
        return difference.abs().sum(dim=-1)
    return torch.linalg.vector_norm(difference, dim=-1)
