"""Similarities and distances of two matrices row by row, in one pass each way.

Losses of pairs need of two embeddings one number. Written out in PyTorch, the way there and back holds several copies
of both matrices: unit rows, their products, and the gradients of each. Here the inputs are read once for the numbers
and once for the gradients, and what is kept between is the inputs and a few numbers a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tileloss import reference
from tileloss.arguments import finite_number, items
from tileloss.backend import accepts_backend, choose
from tileloss.errors import DeviceError, InputError, ShapeError
from tileloss.functional.checks import check_rows, is_distributed_tensor
from tileloss.functional.pairs_op import block_pairs
from tileloss.paired import DISTANCES, PAIRED
from tileloss.similarity import dense, full_precision

_SIMILARITIES = tuple(PAIRED.functions)
# of a number, against one of a similarity in a matrix. On a CPU blocks of cosines always pay, those of angles from 40
# rows of 768; what autograd does for products and distances is little more than has to be: theirs pay from 200 rows on
# for roots of sums of squares, and from 1,300 on for the others, which nothing but memory speaks for before
_WORTH = {"cosine": 1e6, "torch_cosine": 1e6, "angle": 2.2} | dict.fromkeys(("dot", *DISTANCES), 1 / 8)
_WORTH_ON_CPU = _WORTH | dict.fromkeys(("dot", *DISTANCES), 1 / 16) | {"euclidean": 0.4}
# so many matrices are stacked for the definition: a small batch waits for the number of operations, and for two the
# copies cost what the operations saved would. On a CPU they do so for any number of matrices, once the stack has so
# many numbers that PyTorch takes a second thread for an operation, and the C library new pages for the memory
_STACKED_FROM = 3
_LARGEST_STACKED_ON_CPU = 32_768
_METRICS = (*DISTANCES, "cosine", "torch_cosine")


@accepts_backend
def paired_similarity(
    a: Tensor,  # (B, D)
    b: Tensor | Sequence[Tensor],  # (B, D), or N of them
    *,
    similarity: str = "cosine",
    backend: str | None = None,
) -> Tensor:  # (B,) or (B, N)
    """Similarity of every row of `a` with the same row of `b`, or of each of several matrices.

    Args:
        a: (B, D) floating point, any strides; sparse ones are made dense.
        b: (B, D), or a sequence of such matrices, each of which is compared with `a`. One row (1, D), on either side,
            counts for all rows; neither it nor an expanded matrix is copied.
        similarity: "cosine" (norms clamped at 1e-12), "torch_cosine" (as `torch.nn.functional.cosine_similarity`
            clamps: at 1e-8, without the clamp in the gradient), "dot", "angle" (AnglE's, see
            `tileloss.paired.pairwise_angle_sim`), or minus a distance: "euclidean", "manhattan".
        backend: "reference", "tiled", "triton" or "auto", for this call alone; see `tileloss.backend`.

    Returns:
        (B,) for a matrix, (B, N) for a sequence: float64 if any input is, else float32; narrower inputs are read as
        they are and summed in float32. Differentiable in all inputs; the gradient of a Euclidean distance of zero is
        zero. A second derivative goes through the definition: exact, in the memory of plain PyTorch.

    Raises:
        ShapeError, DtypeError, DeviceError, InputError: for inputs that do not fit, before any work.
        BackendError: for a backend that was asked for by name and cannot run.

    Cost:
        Time O(N B D), one read of each input forward; backward one read of each and one write of each gradient.
        Memory beside inputs and gradients: a few numbers a row, and blocks of a few MB on a CPU.

    Source:
        The textbook's formulas; "angle" is Li and Li 2024 (arXiv 2309.12871).

    >>> paired_similarity(torch.eye(2), torch.tensor([[3.0, 0.0], [3.0, 0.0]]))
    tensor([1., 0.])
    """
    if similarity not in _SIMILARITIES:
        raise InputError(f"similarity must be one of {list(_SIMILARITIES)}, got {similarity!r}.")
    found = _measured(a, b, similarity, 0.0)
    return -found if similarity in DISTANCES else found


@accepts_backend
def paired_distance(
    a: Tensor,  # (B, D)
    b: Tensor | Sequence[Tensor],  # (B, D), or N of them
    *,
    metric: str = "euclidean",
    eps: float = 0.0,
    backend: str | None = None,
) -> Tensor:  # (B,) or (B, N)
    """Distance of every row of `a` to the same row of `b`, or of each of several matrices.

    As `paired_similarity`, whose arguments, errors and cost it shares, but for what it returns.

    Args:
        a: (B, D) floating point.
        b: (B, D), or a sequence of such matrices.
        metric: "euclidean", "squared_euclidean", "manhattan", or 1 - "cosine" or "torch_cosine".
        eps: is added to every difference of a Euclidean or Manhattan distance, as
            `torch.nn.functional.pairwise_distance` does with 1e-6: equal rows are then at a distance, and have a
            gradient.
        backend: "reference", "tiled", "triton" or "auto", for this call alone; see `tileloss.backend`.

    Returns:
        (B,) for a matrix, (B, N) for a sequence: float64 if any input is, else float32. Differentiable in all inputs.

    >>> paired_distance(torch.zeros(2, 2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([5., 1.])
    """
    if metric not in _METRICS:
        raise InputError(f"metric must be one of {list(_METRICS)}, got {metric!r}.")
    found = _measured(a, b, metric, finite_number(eps, "eps must be a finite number"))
    return found if metric in DISTANCES else 1 - found


def _measured(a: Tensor, b: Tensor | Sequence[Tensor], measure: str, eps: float) -> Tensor:
    if isinstance(b, Tensor):
        return paired_columns(a, [b], measure, eps)[0]
    return paired_matrix(a, items(b, "b must be a tensor or a sequence of tensors"), measure, eps)


def paired_matrix(
    a: Tensor,  # (B, D)
    others: Sequence[Tensor],  # N times (B, D)
    measure: str,
    eps: float = 0.0,
) -> Tensor:  # (B, N)
    """As `paired_columns`, beside each other."""
    found = paired_columns(a, others, measure, eps)
    return found.t() if isinstance(found, Tensor) else torch.stack(list(found), dim=1)


def paired_columns(
    a: Tensor,  # (B, D)
    others: Sequence[Tensor],  # N times (B, D)
    measure: str,
    eps: float = 0.0,
) -> Sequence[Tensor] | Tensor:  # N times (B,), or (N, B)
    """As `paired_similarity` for several matrices, column by column: for losses, which know what they ask for.

    Args:
        measure: "cosine", "torch_cosine", "dot" or "angle", which are similarities; "euclidean", "squared_euclidean"
            and "manhattan" are distances, and not yet minus them.
    """
    a, *others = aligned_rows(a, others)
    chosen = _backend(a, others, measure)
    columns: Sequence[Tensor] | Tensor
    if chosen != "reference":
        columns = block_pairs(a, others, measure, eps, chosen)
    else:
        with full_precision(a):
            columns = _definition(a, others, measure, eps)
    return [x.abs() for x in columns] if measure == "angle" else columns  # the way back needs the sign


def _definition(a: Tensor, others: Sequence[Tensor], measure: str, eps: float) -> Sequence[Tensor] | Tensor:
    if len(others) < _STACKED_FROM or (a.is_cpu and a.numel() * len(others) > _LARGEST_STACKED_ON_CPU):
        return [reference.paired_measure(a, other, measure, eps) for other in others]
    return reference.paired_measure(a, torch.stack(list(others)), measure, eps)


def aligned_rows(a: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
    """The matrices as dense ones with as many rows each, or an error that says which does not fit."""
    if _are_alike(a, others):
        return [a, *others]
    _check(a, others)
    return _aligned([dense(a), *map(dense, others)])


def _are_alike(a: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether the matrices are dense, of one shape, dtype and device: nearly all are, and a microsecond tells it."""
    if not (isinstance(a, Tensor) and a.ndim == 2 and a.is_floating_point() and len(others) > 0):
        return False
    shape, dtype, device = a.shape, a.dtype, a.device
    if a.layout != torch.strided or is_distributed_tensor(a):
        return False
    return all(
        isinstance(b, Tensor)
        and b.shape == shape
        and b.dtype == dtype
        and b.device == device
        and b.layout == torch.strided
        and not is_distributed_tensor(b)
        for b in others
    )


def _check(a: Tensor, others: Sequence[Tensor]) -> None:
    check_rows("a", a)
    if len(others) == 0:
        raise InputError("There is nothing to compare a with: b is an empty sequence.")
    for place, b in enumerate(others):
        name = "b" if len(others) == 1 else f"b[{place}]"
        check_rows(name, b)
        if a.device != b.device:
            raise DeviceError(f"a is on {a.device} and {name} on {b.device}; move both to one device.")
        if a.shape == b.shape:
            continue
        (rows, width), (other_rows, other_width) = a.shape, b.shape
        if width != other_width:
            raise ShapeError(
                f"Rows of a have {width} numbers and rows of {name} {other_width}; embed both by one model."
            )
        if rows != other_rows and 1 not in (rows, other_rows):
            raise ShapeError(f"a has {rows} rows and {name} {other_rows}: row i is compared with row i.")


def _aligned(matrices: list[Tensor]) -> list[Tensor]:
    """The matrices with as many rows each: single rows count for all, without copies."""
    if all(x.shape == matrices[0].shape for x in matrices):
        return matrices
    counts = [x.shape[0] for x in matrices]
    rows = max(counts) if min(counts) else 0
    if any(count not in (1, rows) for count in counts):
        raise ShapeError(f"The matrices have {counts} rows: each must have as many, or one that counts for all.")
    return [x.expand(rows, -1) for x in matrices]


def _backend(a: Tensor, others: list[Tensor], measure: str) -> str:
    size = a.numel() * len(others)
    if size == 0:
        return "reference"  # whatever is asked for: without numbers there are no blocks, and the result is known
    widest = a  # of mixed inputs it decides, for they are computed in its dtype
    for x in others:
        widest = x if x.dtype != widest.dtype and x.element_size() > widest.element_size() else widest
    worth = (_WORTH_ON_CPU if a.is_cpu else _WORTH)[measure]
    return choose(widest, int(size * worth)).backend
