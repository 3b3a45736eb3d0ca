"""Similarities of two matrices row by row, under sentence-transformers' names, and how others are recognised.

Row i of one matrix is compared with row i of the other. These functions are the plain formulas, made of PyTorch's
operations; `tileloss.functional.paired_similarity` computes the same in one pass each way. Where a loss is given one
of them, or sentence-transformers' function of the same name, it takes that pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tileloss.similarity import NORM_FLOOR, SimilarityFn, StockSimilarities, dense, up


def _numbers(x: Any) -> Tensor:
    """A tensor of at least float32 from a tensor, array or list; a sparse one is made dense."""
    return dense(up(x if isinstance(x, Tensor) else torch.as_tensor(x)))


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(NORM_FLOOR)


def pairwise_cos_sim(
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D)
) -> Tensor:  # (B,)
    """Cosine similarity of every row of `a` with the same row of `b`; norms are clamped at 1e-12 inside the graph.

    Inputs narrower than float32 are computed and returned in float32.

    >>> pairwise_cos_sim(torch.eye(2), torch.tensor([[3.0, 0.0], [3.0, 0.0]]))
    tensor([1., 0.])
    """
    return pairwise_dot_score(_unit(_numbers(a)), _unit(_numbers(b)))


def torch_pairwise_cosine(
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D)
) -> Tensor:  # (B,)
    """As `pairwise_cos_sim`, by `torch.nn.functional.cosine_similarity`, which differs near zero alone.

    It clamps norms at 1e-8, and outside the graph: the norm of a row below that still has a gradient.
    """
    return F.cosine_similarity(_numbers(a), _numbers(b), dim=-1)


def pairwise_dot_score(
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D)
) -> Tensor:  # (B,)
    """Dot product of every row of `a` with the same row of `b`, in float32 or the wider input dtype."""
    return (_numbers(a) * _numbers(b)).sum(dim=-1)


def pairwise_euclidean_sim(
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D)
) -> Tensor:  # (B,)
    """Negative Euclidean distance of every row of `a` to the same row of `b`, with gradient zero at distance zero."""
    return -torch.linalg.vector_norm(_numbers(a) - _numbers(b), dim=-1)


def pairwise_manhattan_sim(
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D)
) -> Tensor:  # (B,)
    """Negative Manhattan (L1) distance of every row of `a` to the same row of `b`."""
    return -(_numbers(a) - _numbers(b)).abs().sum(dim=-1)


def pairwise_angle_sim(
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D)
) -> Tensor:  # (B,)
    """How close two rows are as complex vectors: |cosine + sine|, between 0 and the square root of 2.

    Of the unit rows, the first half holds real and the second imaginary parts; an odd width is padded by a zero.
    Source: Li and Li 2024 (arXiv 2309.12871).
    """
    return signed_angle(a, b).abs()


def signed_angle(
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D)
) -> Tensor:  # (B,)
    """Cosine plus sine, as `pairwise_angle_sim` has them before it takes the absolute value."""
    a, b = _numbers(a), _numbers(b)
    if a.shape[-1] % 2:
        a, b = (F.pad(x, (0, 1)) for x in (a, b))
    real, imaginary = _unit(b).chunk(2, dim=-1)
    # a * conj(b), real part and imaginary part, summed as one product
    return (_unit(a) * torch.cat([real - imaginary, real + imaginary], dim=-1)).sum(dim=-1)


# what is measured as a distance, and is a similarity with a minus sign
DISTANCES = ("euclidean", "squared_euclidean", "manhattan")

PAIRED = StockSimilarities(
    {
        "cosine": pairwise_cos_sim,
        "torch_cosine": torch_pairwise_cosine,
        "dot": pairwise_dot_score,
        "euclidean": pairwise_euclidean_sim,
        "manhattan": pairwise_manhattan_sim,
        "angle": pairwise_angle_sim,
    },
    "similarity_pairwise",
    {},
)


def recognise_paired(similarity: str | SimilarityFn) -> str | SimilarityFn:
    """The name of a similarity that `paired_similarity` computes in one pass, or the callable itself when it has none.

    As `StockSimilarities.recognise` has it: takes the names, our functions and their sentence-transformers namesakes,
    a member of its `SimilarityFunction`, and the bound `model.similarity_pairwise` of a SentenceTransformer.
    """
    return PAIRED.recognise(similarity)
