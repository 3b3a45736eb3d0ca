"""The mean squared difference of two matrices over row blocks, and its gradient while a block is in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from tileloss.similarity import up_dtype

# of differences at a time: measured on a CPU with 1 MB of second-level cache a core
_BLOCK_BYTES = 2 << 20


def mean_squared_error(
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D), or (1, D) for all rows
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The mean (0-dim) in at least float32, and the gradient of `a` (B, D) in its dtype."""
    dtype, (rows, width) = up_dtype(a.dtype), a.shape
    b = b.expand_as(a)
    step = max(_BLOCK_BYTES // (width * dtype.itemsize), 1)
    gradient = torch.empty(rows, width, dtype=a.dtype, device=a.device) if with_gradient else None
    # a gradient as wide as the sums is made where it belongs
    own_place = gradient if gradient is not None and gradient.dtype == dtype else None
    scratch = torch.empty(min(step, rows), width, dtype=dtype, device=a.device) if own_place is None else None
    lengths = torch.empty(rows, dtype=dtype, device=a.device)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        out = own_place[part] if scratch is None else scratch[: part.stop - start]
        difference = torch.sub(a[part].to(dtype), b[part].to(dtype), out=out)
        torch.linalg.vector_norm(difference, dim=1, out=lengths[part])
        if gradient is not None:
            difference.mul_(2.0 / a.numel())
            if own_place is None:
                gradient[part] = difference
    return lengths.square_().sum() / a.numel(), gradient
