"""Cosines of paired rows at several prefix widths at once.

The dot product and the squared norms of a prefix are sums over the segments between one width and the next, so one
read of both inputs gives the cosines at every width.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tileloss.arguments import items
from tileloss.backend import accepts_backend, choose
from tileloss.errors import DeviceError, DtypeError, InputError, ShapeError
from tileloss.functional.checks import check_rows
from tileloss.functional.prefix_cosines_op import block_prefix_cosines
from tileloss.reference.prefix_cosines import prefix_cosines as definition
from tileloss.similarity import dense, full_precision, up_dtype


@accepts_backend
def prefix_cosines(
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D)
    dims: Sequence[int],
    *,
    backend: str | None = None,
) -> Tensor:  # (B, K)
    """The cosine of the first d numbers of each row of `a` with those of the same row of `b`, for each d of `dims`.

    Args:
        a: (B, D) floating point, any strides; sparse ones are made dense.
        b: (B, D).
        dims: the K prefix widths, each from 1 to D, in any order.
        backend: "reference", "tiled", "triton" or "auto", for this call alone; see `tileloss.backend`.

    Returns:
        (B, K), columns in the order of `dims`: float64 for float64 inputs, else float32. Norms are clamped at 1e-12.
        Differentiable any number of times.

    Raises:
        ShapeError, DtypeError, DeviceError, InputError: for inputs that do not fit, before any work.
        BackendError: for a backend that was asked for by name and cannot run.

    Cost:
        One read of both inputs forward, one read and one write backward, O(B D) whatever K is. Memory beside inputs
        and gradients: O(K B).

    Source:
        Kusupati et al. 2022 (arXiv 2205.13147).

    >>> a, b = torch.randn(8, 64, requires_grad=True), torch.randn(8, 64)
    >>> prefix_cosines(a, b, [64, 32, 16]).shape
    torch.Size([8, 3])
    """
    check_rows("a", a)
    check_rows("b", b)
    if a.shape != b.shape:
        raise ShapeError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; row i of one is paired with the other's."
        )
    if a.device != b.device:
        raise DeviceError(f"a is on {a.device} and b on {b.device}; move both to one device.")
    if up_dtype(a.dtype) != up_dtype(b.dtype):
        raise DtypeError(f"a is {a.dtype} and b {b.dtype}; convert one to the other's dtype.")
    given = check_dims(dims, a.shape[1])
    a, b = dense(a), dense(b)
    # of mixed inputs the wider one decides, for they are computed in its dtype
    widest = a if a.element_size() >= b.element_size() else b
    chosen = choose(widest).backend  # whatever the size: even of a few rows, one read is faster than K
    if chosen == "reference":
        with full_precision(a):
            return definition(a, b, given)
    widths = sorted(set(given))
    cosines, _ = block_prefix_cosines(a, b, widths, chosen)
    if given != widths:
        rows = cosines.unbind()  # one by one, because an index of several is a tensor that goes to the device
        cosines = torch.stack([rows[widths.index(dim)] for dim in given])
    return cosines.T


def check_dims(dims: Any, width: int) -> list[int]:
    """The prefix widths as integers; refuses none at all, and what rows of `width` numbers have no prefix of."""
    given = items(dims, "dims must be a sequence of prefix widths")
    try:
        found = [operator.index(dim) for dim in given]
    except TypeError:
        raise InputError(f"dims must hold integers, got {list(given)}.") from None
    if not found:
        raise InputError("You must provide at least one prefix width in dims.")
    if min(found) <= 0:
        raise InputError(f"All prefix widths in dims must be > 0, got {found}.")
    if max(found) > width:
        raise ShapeError(f"Prefix widths in dims cannot exceed the width of the embeddings, {width}, got {found}.")
    return found
