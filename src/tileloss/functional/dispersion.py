"""How far the rows of a batch are spread out: two moments of their similarities, without the matrix of them.

Written out they are means over a matrix of B x B. Both are functions of a matrix of D x D and a vector, which for
large batches are the smaller by far.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tileloss.backend import accepts_backend, choose
from tileloss.errors import ShapeError
from tileloss.functional.checks import check_rows
from tileloss.functional.dispersion_op import gram_dispersion
from tileloss.reference.dispersion import dispersion as definition
from tileloss.similarity import SimilarityFn, dense, full_precision, recognise
from tileloss.tiled.block_similarity import BLOCK_SIMILARITIES


class Dispersion(NamedTuple):
    """Two moments of the similarities of different rows, 0-dim each.

    Attributes:
        mean: of the similarities; zero for directions that are drawn at random.
        second_moment: the mean of their squares; 1/D for cosines of directions that are drawn at random.
    """

    mean: Tensor
    second_moment: Tensor


@accepts_backend
def dispersion(
    embeddings: Tensor,  # (B, D)
    *,
    similarity: str | SimilarityFn = "cosine",
    backend: str | None = None,
) -> Dispersion:
    """The mean of the similarities of all pairs of different rows, and the mean of their squares.

    Rows that are spread evenly over the sphere have a mean cosine of about zero and a second moment of about 1/D; what
    lies above is crowding. A batch of fewer than two rows has zero for both, and zero gradients.

    Args:
        embeddings: (B, D) floating point, any strides; sparse ones are made dense.
        similarity: "cosine", "dot", "euclidean" or "manhattan" (negative distances), sentence-transformers' function
            of that name, or any callable (N, D), (N, D) -> (N, N). Cosine and dot products need no matrix of
            similarities; all else is materialised.
        backend: "reference", "tiled", "triton" or "auto", for this call alone; see `tileloss.backend`.

    Returns:
        `Dispersion(mean, second_moment)`, in float64 for float64 inputs, else float32. Differentiable in the
        embeddings. A second derivative goes through the materialised definition: exact, in O(B^2) memory.

    Raises:
        ShapeError, DtypeError, InputError: for inputs that do not fit, before any work.
        BackendError: for a backend that was asked for by name and cannot run.

    Cost:
        One GEMM of B x D x min(B, D) forward and one backward. Memory beside inputs and gradients: a Gram matrix of
        min(B, D)^2, and for B > D a block of rows, 1 MB on a CPU and 224 MB on a GPU, else a copy of the inputs.
        With B > D the share of the diagonal is subtracted from sums over all pairs: dot products of rows of very
        unequal lengths (by factors of hundreds, in float32) lose digits there, and of lengths whose fourth power
        overflows the second moment is nan; cosines do not.

    Source:
        Zhang, Yu, Kumar, Chang 2017 (arXiv 1708.06320), global orthogonal regularization; the sum of squares by the
        other Gram matrix is the textbook's |X X'| = |X' X|.

    >>> embeddings = torch.randn(1000, 16, requires_grad=True)
    >>> spread = dispersion(embeddings)
    >>> (spread.mean.square() + (spread.second_moment - 1 / 16).relu()).backward()
    """
    known = recognise(similarity)
    check_rows("embeddings", embeddings)
    embeddings = dense(embeddings)
    size = len(embeddings)
    chosen = choose(embeddings, size * size, _obstacles(known)).backend
    if chosen != "reference" and embeddings.numel():  # without numbers there are no blocks
        return Dispersion(*gram_dispersion(embeddings, str(known), chosen)[:2])
    with full_precision(embeddings):
        return Dispersion(*definition(embeddings, known if isinstance(known, str) else _checked(known, size)))


def _obstacles(similarity: str | SimilarityFn) -> dict[str, str]:
    if isinstance(similarity, str) and BLOCK_SIMILARITIES[similarity].is_product:
        return {}
    reason = f"dispersion by {similarity!r} takes all similarities at once, and only by 'cosine' and 'dot' does not"
    return dict.fromkeys(("tiled", "triton"), reason)


def _checked(similarity: SimilarityFn, size: int) -> SimilarityFn:
    """The callable, whose result must be a matrix for all rows."""

    def measure(a: Tensor, b: Tensor) -> Tensor:
        found = similarity(a, b)
        if not isinstance(found, Tensor) or found.shape != (size, size):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeError(f"The similarity must return a ({size}, {size}) matrix for {size} rows, got {shape}.")
        return found

    return measure
