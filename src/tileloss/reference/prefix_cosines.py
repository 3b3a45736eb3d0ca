"""Cosines of paired rows at several prefix widths as their definition reads: once for each width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tileloss.similarity import NORM_FLOOR, up


def prefix_cosines(
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D)
    dims: Sequence[int],
) -> Tensor:  # (B, K)
    """The cosine of the first d numbers of each row of `a` with those of `b`, for each d of `dims`.

    Differentiable any number of times. Time O(B K D), memory copies of all prefixes.
    """
    return torch.stack([(_unit(up(a)[:, :d]) * _unit(up(b)[:, :d])).sum(dim=1) for d in dims], dim=1)


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(NORM_FLOOR)
