"""How similar the rows of a batch are to each other: the matrix of similarities, and two means of it without its
diagonal. Gradients by autograd.
"""

from __future__ import annotations

from torch import Tensor

from tileloss.similarity import SIMILARITIES, SimilarityFn, up


def dispersion(
    embeddings: Tensor,  # (B, D)
    similarity: str | SimilarityFn,
) -> tuple[Tensor, Tensor]:
    """The mean of the similarities of different rows, and the mean of their squares, 0-dim each.

    Of fewer than two rows both are zero, with a gradient of zero. Time O(B^2 D), memory four (B, B) matrices with
    their gradients.
    """
    measure = SIMILARITIES[similarity] if isinstance(similarity, str) else similarity
    similarities = up(measure(embeddings, embeddings))
    others = similarities.clone()  # a copy, for a callable may return what cannot be written to
    others.diagonal().zero_()  # fill_diagonal_ would bind a compiled graph to one batch size
    pairs = max(len(embeddings) * (len(embeddings) - 1), 1)
    return others.sum() / pairs, others.square().sum() / pairs
