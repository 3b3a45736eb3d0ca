"""How similar each query of a batch is to its own document of every column, by any similarity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tileloss.functional.pairs import paired_matrix
from tileloss.paired import DISTANCES, recognise_paired
from tileloss.similarity import SimilarityFn


def paired_scores(
    similarity_fct: str | SimilarityFn,
    queries: Tensor,  # (B, D)
    docs: Sequence[Tensor],  # N columns, (B, D) each
) -> Tensor:  # (B, N)
    """The similarity of query i with row i of each column.

    Stock similarities, ours and sentence-transformers', take one pass over the embeddings and return at least float32;
    any other function is called for each column.
    """
    known = recognise_paired(similarity_fct)
    if not isinstance(known, str):
        return torch.stack([known(queries, column) for column in docs], dim=1)
    found = paired_matrix(queries, docs, known)
    return -found if known in DISTANCES else found
