"""The hardest in-batch negative of each query, without the batch-by-batch matrix.

A loss that looks at one negative a query needs of the matrix of similarities only its rows' maxima. The forward finds
them block by block; the backward is a gather and a sum over the chosen pairs, where autograd through the matrix would
multiply two matrices that are zero almost everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tileloss.backend import accepts_backend, choose
from tileloss.functional.checks import check_queries_and_docs
from tileloss.functional.hardest_op import block_hardest
from tileloss.reference.hardest import hardest_negatives as definition
from tileloss.similarity import SimilarityFn, dense, full_precision, recognise
from tileloss.tiled.block_similarity import BLOCK_SIMILARITIES

# of a similarity, against one whose gradient is multiplied back: without those GEMMs, blocks pay from 128 x 128 on a
# CPU, where contrastive losses wait for 256 x 256
_WORTH = 4


class HardestNegatives(NamedTuple):
    """What a query's row of similarities comes down to.

    Attributes:
        similarity: (B,) of each query with its hardest negative; minus infinity where there is no other document.
        index: (B,) int64, the row of that negative among the documents, the first of equals; -1 where there is none,
            or none with a similarity above minus infinity.
        positive_similarity: (B,) of each query with its own document, which the same pass yields.
    """

    similarity: Tensor
    index: Tensor  # type: ignore[assignment]  # hides a method of tuples, which nobody misses
    positive_similarity: Tensor


@accepts_backend
def hardest_negatives(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (M, D)
    *,
    similarity: str | SimilarityFn = "cosine",
    backend: str | None = None,
) -> HardestNegatives:
    """For each query the most similar document other than its own, and how similar its own is.

    Both similarities are differentiable in queries and docs; the gradient of a maximum goes to the one pair at
    `index`.

    Args:
        queries: (B, D) floating point, any strides; sparse ones are made dense.
        docs: (M, D), M >= B. Row i < B is query i's own document, and every other row a negative of it.
        similarity: "cosine", "dot", "euclidean" or "manhattan" (negative distances), sentence-transformers' function
            of that name, or any callable (N, D), (M, D) -> (N, M). Cosine and dot products are computed in row
            blocks; all else is materialised.
        backend: "reference", "tiled", "triton" or "auto", for this call alone; see `tileloss.backend`.

    Returns:
        `HardestNegatives(similarity, index, positive_similarity)`; similarities in float64 for float64 inputs, else
        float32. A second derivative goes through the materialised definition: exact, in O(B M) memory.

    Raises:
        ShapeError, DtypeError, DeviceError, InputError: for inputs that do not fit, before any work.
        BackendError: for a backend that was asked for by name and cannot run.

    Cost:
        One GEMM of B x M x D forward; O((B + M) D) backward. Memory beside inputs and gradients: a copy of the docs
        and a block of 16 MB on a CPU and 224 MB on a GPU forward, a copy of the inputs backward.

    Source:
        Wieting and Gimpel 2018 (https://aclanthology.org/P18-1042), section 3.2: mega-batching.

    >>> queries, docs = torch.randn(64, 32, requires_grad=True), torch.randn(64, 32)
    >>> hardest = hardest_negatives(queries, docs)
    >>> (hardest.similarity - hardest.positive_similarity + 0.5).relu().mean().backward()
    """
    known = recognise(similarity)
    check_queries_and_docs(queries, docs)
    queries, docs = dense(queries), dense(docs)
    # of mixed inputs the wider one decides, for they are computed in its dtype
    widest = queries if queries.element_size() >= docs.element_size() else docs
    chosen = choose(widest, _WORTH * len(queries) * len(docs), _obstacles(known)).backend
    if chosen == "reference" or queries.numel() == 0:  # without numbers there are no blocks
        with full_precision(queries):
            return HardestNegatives(*definition(queries, docs, known))
    return HardestNegatives(*block_hardest(queries, docs, str(known), chosen))


def _obstacles(similarity: str | SimilarityFn) -> dict[str, str]:
    if isinstance(similarity, str) and BLOCK_SIMILARITIES[similarity].is_product:
        return {}
    reason = f"hardest negatives by {similarity!r} have no block algorithm, only those by 'cosine' and 'dot'"
    return dict.fromkeys(("tiled", "triton"), reason)
