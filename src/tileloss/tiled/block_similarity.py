"""The block form of a similarity, by its name or around a callable."""

from __future__ import annotations

from tileloss.similarity import SimilarityFn
from tileloss.tiled.halves import CosineInHalves
from tileloss.tiled.rows import Rows
from tileloss.tiled.similarity import Cosine, Dot, Euclidean, Manhattan, RowwiseCallable, TorchCosine

BLOCK_SIMILARITIES: dict[str, type[Dot]] = {
    "cosine": Cosine,
    "torch_cosine": TorchCosine,
    "dot": Dot,
    "euclidean": Euclidean,
    "manhattan": Manhattan,
}


def block_similarity(similarity: str | SimilarityFn, rows: Rows) -> Dot:
    """The block form of a similarity for rows that are read so: by its name, or around a row-wise callable."""
    if not isinstance(similarity, str):
        return RowwiseCallable(rows, similarity)
    kind = BLOCK_SIMILARITIES[similarity]
    return CosineInHalves(rows, kind.floor) if rows.in_halves and issubclass(kind, Cosine) else kind(rows)
