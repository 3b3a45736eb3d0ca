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

    Where no other document has a similarity above minus infinity, as where there is none, the index is -1. Time
    O(B M D), memory three (B, M) matrices with their gradients.
    """
    measure = SIMILARITIES[similarity] if isinstance(similarity, str) else similarity
    similarities = up(measure(queries, docs))
    own = similarities.diagonal()
    if len(docs) == 0:  # of nothing there is no maximum
        return own, torch.empty_like(own, dtype=torch.int64), own
    hardest, index = similarities.diagonal_scatter(torch.full_like(own, float("-inf"))).max(dim=1)
    nowhere = hardest == float("-inf")
    return hardest.masked_fill(nowhere, float("-inf")), index.masked_fill(nowhere, -1), own
