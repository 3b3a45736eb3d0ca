"""The hardest negative of each query as its definition reads: the matrix of similarities, and the maxima of its rows.

Document i is query i's own; every other document is a negative. Gradients by autograd, to one entry a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tileloss.similarity import SIMILARITIES, SimilarityFn, up


def hardest_negatives(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (M, D): row i < B belongs to query i
    similarity: str | SimilarityFn,
) -> tuple[Tensor, Tensor, Tensor]:
    """Similarity (B,) and index (B,) of the most similar other document, and the similarity (B,) of a query's own.

    Where there is no other document, the similarity is minus infinity and the index -1. Time O(B M D), memory three
    (B, M) matrices with their gradients.
    """
    measure = SIMILARITIES[similarity] if isinstance(similarity, str) else similarity
    similarities = up(measure(queries, docs))
    own = similarities.diagonal()
    if len(docs) < 2:  # of nothing there is no maximum
        nowhere = torch.full_like(own, -1, dtype=torch.int64)
        return own.masked_fill(nowhere < 0, float("-inf")), nowhere, own
    hardest, index = similarities.diagonal_scatter(torch.full_like(own, float("-inf"))).max(dim=1)
    return hardest, index, own
