"""All distances or similarities between two sets of rows: the definition.

Euclidean distances take the difference of squares, so that one GEMM does the work. What lies within its rounding is
zero; a Euclidean distance of zero has gradient zero. Manhattan distances hold all N x M x D differences, because the
gradient of `torch.cdist` cannot be differentiated again; where numbers are equal the gradient is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tileloss.metrics import ROUNDING
from tileloss.similarity import cos_sim, dot_score, up


def pairwise_matrix(
    a: Tensor,  # (N, D)
    b: Tensor | None,  # (M, D); None compares `a` with itself
    metric: str,
    similarity: bool,
) -> Tensor:  # (N, M)
    """Distances between all rows of `a` and all rows of `b`, or the similarities that belong to them.

    Args:
        metric: one of `tileloss.metrics.METRICS`.
        similarity: give the cosine or the product itself, and otherwise minus the distance.
    """
    a = up(a)
    other = a if b is None else up(b)
    if metric == "dot" or (metric == "cosine" and similarity):
        similarities = dot_score(a, other) if metric == "dot" else cos_sim(a, other)
        return similarities if similarity else -similarities
    itself = b is None
    if metric in ("euclidean", "squared_euclidean"):
        distances = _euclidean(a, other, itself, squared=metric == "squared_euclidean")
    else:
        distances = 1.0 - cos_sim(a, other) if metric == "cosine" else (a[:, None] - other).abs().sum(dim=2)
        distances = _at_no_distance_from_itself(distances) if itself else distances
    return -distances if similarity else distances


def _euclidean(
    a: Tensor,  # (N, D)
    b: Tensor,  # (M, D)
    itself: bool,
    squared: bool,
) -> Tensor:  # (N, M)
    left, right = a.square().sum(dim=1)[:, None], b.square().sum(dim=1)
    # in this order, because the sum of two norms can overflow where the distance does not
    squares = torch.sub(right, a @ b.T, alpha=2) + left
    if itself:  # before the root, through which a norm that overflows would come back as nan
        squares = _at_no_distance_from_itself(squares)
    rounding = (left + right).detach() * (ROUNDING * torch.finfo(squares.dtype).eps)
    nearly_equal = squares.detach() <= rounding.nan_to_num_(0.0, 0.0)  # what overflows is near nothing
    if squared:  # the gradient, twice the difference, is no less exact there than elsewhere
        return squares - torch.where(nearly_equal, squares.detach(), 0.0)
    return torch.where(nearly_equal, 0.0, torch.where(nearly_equal, 1.0, squares).sqrt())


def _at_no_distance_from_itself(distances: Tensor) -> Tensor:  # (N, N)
    return torch.diagonal_scatter(distances, distances.new_zeros(len(distances)))
