"""Matrices of distances or similarities, for those who do want the matrix.

The matrix is the result and has to exist; what need not exist are the differences of all rows, N x M x D of them, and
the further matrices that autograd would keep. Euclidean, cosine and dot take one GEMM and an epilogue in place;
Manhattan goes over the width tile by tile. The way back starts from the rows and, where it helps, the result itself.
"""

from __future__ import annotations

from torch import Tensor

from tileloss import reference
from tileloss.backend import accepts_backend, choose
from tileloss.errors import DeviceError, DtypeError, InputError, ShapeError
from tileloss.functional.checks import check_rows
from tileloss.functional.pairwise_op import block_matrix
from tileloss.metrics import METRICS
from tileloss.similarity import dense, full_precision, up_dtype


@accepts_backend
def pairwise_distance(
    a: Tensor,  # (N, D)
    b: Tensor | None = None,  # (M, D)
    *,
    metric: str = "euclidean",
    backend: str | None = None,
) -> Tensor:  # (N, M)
    """Distances between all rows of `a` and all rows of `b`.

    Args:
        a: (N, D) floating point, any strides; sparse ones are made dense.
        b: (M, D), or None for the distances within `a`: then the diagonal is exactly zero (but for "dot"), and the
            gradients of rows and columns both go to `a`.
        metric: "euclidean", "squared_euclidean", "cosine" (1 - cosine, norms clamped at 1e-12), "manhattan", or "dot"
            (minus the product). The Euclidean two take the difference of squares: what lies within its rounding is
            zero (in float32, rows nearer than about 0.3 % of their norms), and there "euclidean" has gradient zero.
        backend: "reference", "tiled", "triton" or "auto", for this call alone; see `tileloss.backend`.

    Returns:
        (N, M): float64 for float64 inputs, else float32; narrower inputs are read as they are and summed in float32.
        Differentiable in `a` and `b`. A second derivative goes through the materialised definition: exact, in O(N M)
        memory, for "manhattan" O(N M D).

    Raises:
        ShapeError, DtypeError, DeviceError, InputError: for inputs that do not fit, before any work.
        BackendError: for a backend that was asked for by name and cannot run.

    Cost:
        Time O(N M D): one GEMM forward and one for each gradient. Memory beside result and gradients: a copy of the
        inputs, and blocks of 16 MB on a CPU, none in Triton; "euclidean" keeps its result for the way back, and so
        does "cosine" in Triton.

    Source:
        Hermans, Beyer, Leibe 2017 (arXiv 1703.07737) for the use; the formulas are the textbook's.

    >>> pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    tensor([[0., 5.],
            [5., 0.]])
    """
    return _matrix(a, b, metric, "metric", similarity=False)


@accepts_backend
def pairwise_similarity(
    a: Tensor,  # (N, D)
    b: Tensor | None = None,  # (M, D)
    *,
    similarity: str = "cosine",
    backend: str | None = None,
) -> Tensor:  # (N, M)
    """Similarities of all rows of `a` with all rows of `b`.

    As `pairwise_distance`, whose arguments, errors and cost it shares, but for what it returns.

    Args:
        a: (N, D) floating point.
        b: (M, D), or None for the similarities within `a`; the gradients of rows and columns then both go to `a`.
        similarity: "cosine", "dot", or minus the distance: "euclidean", "squared_euclidean", "manhattan".
        backend: "reference", "tiled", "triton" or "auto", for this call alone; see `tileloss.backend`.

    Returns:
        (N, M): float64 for float64 inputs, else float32. Differentiable in `a` and `b`.

    >>> pairwise_similarity(torch.eye(2), torch.tensor([[3.0, 0.0]]))
    tensor([[1.],
            [0.]])
    """
    return _matrix(a, b, similarity, "similarity", similarity=True)


def _matrix(a: Tensor, b: Tensor | None, metric: str, argument: str, similarity: bool) -> Tensor:
    if metric not in METRICS:
        raise InputError(f"{argument} must be one of {list(METRICS)}, got {metric!r}.")
    check_rows("a", a)
    if b is not None:
        check_rows("b", b)
        _check_pair(a, b)
        b = dense(b)
    a = dense(a)
    chosen = _backend(a, a if b is None else b, metric)
    if chosen != "reference":
        return block_matrix(a, b, metric, similarity, chosen)
    with full_precision(a):
        return reference.pairwise_matrix(a, b, metric, similarity)


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.device != b.device:
        raise DeviceError(f"a is on {a.device} and b on {b.device}; move both to one device.")
    if a.shape[1] != b.shape[1]:
        raise ShapeError(f"Rows of a have {a.shape[1]} numbers and rows of b {b.shape[1]}; embed both by one model.")
    if up_dtype(a.dtype) != up_dtype(b.dtype):
        raise DtypeError(f"a is {a.dtype} and b {b.dtype}; convert one to the other's dtype.")


def _backend(a: Tensor, b: Tensor, metric: str) -> str:
    if a.numel() == 0 or b.numel() == 0:
        return "reference"  # whatever is asked for: without numbers there are no blocks, and the result is known
    # of mixed inputs the wider one decides, for they are computed in its dtype
    widest = a if a.element_size() >= b.element_size() else b
    # Manhattan's definition makes all differences, and is slower than the blocks at any size
    return choose(widest, None if metric == "manhattan" else len(a) * len(b)).backend
