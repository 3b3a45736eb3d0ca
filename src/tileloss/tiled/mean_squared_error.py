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
    # differences are made where the gradient belongs, unless that is narrower than the sums
    is_in_place = gradient is not None and gradient.dtype == dtype
    scratch = torch.empty(0 if is_in_place else min(step, rows), width, dtype=dtype, device=a.device)
    lengths = torch.empty(rows, dtype=dtype, device=a.device)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        target = gradient[part] if gradient is not None else None
        out = target if target is not None and is_in_place else scratch[: part.stop - start]
        torch.sub(a[part].to(dtype), b[part].to(dtype), out=out)
        torch.linalg.vector_norm(out, dim=1, out=lengths[part])
        if target is not None:
            torch.mul(out, 2.0 / a.numel(), out=target)
    return lengths.square_().sum() / a.numel(), gradient
