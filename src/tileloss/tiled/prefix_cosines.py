"""Cosines of paired rows at several prefix widths in PyTorch, a few rows at a time: one read of the inputs each way.

The dot product and the squared norms of a prefix are sums over segments, so cumulative sums over the K segments give
every width. Backward, a segment's gradient is a combination of the two rows' segments, whose two coefficients are
again cumulative sums, over the widths that reach the segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tileloss.similarity import NORM_FLOOR, up, up_dtype
from tileloss.tiled.prefixes import add_up_, segments

# bytes of the rows that are gone through at a time, of each input: they stay in the cache between operations
_PART_BYTES = 1 << 20


def prefix_cosines(
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D)
    dims: Sequence[int],  # ascending, without repeats
) -> tuple[Tensor, Tensor]:
    """The cosines (K, B), and the norms (2, K, B) that the backward wants, as `tileloss.reference.prefix_cosines`.

    Memory beside the results: products of a few rows.
    """
    dtype = torch.promote_types(up_dtype(a.dtype), up_dtype(b.dtype))
    sums = torch.empty(3, len(dims), len(a), dtype=dtype, device=a.device)
    for rows in _parts(a):
        x, y = (up(side[rows]) for side in (a, b))
        for k, place in enumerate(segments(dims)):
            for total, (left, right) in zip(sums[:, k], ((x, x), (y, y), (x, y)), strict=True):
                torch.sum(left[:, place] * right[:, place], dim=1, out=total[rows])
    add_up_(sums.transpose(0, 1))
    norms = sums[:2].sqrt()
    return sums[2] / norms.clamp_min(NORM_FLOOR).prod(0), norms


def prefix_cosines_backward(
    d_cosines: Tensor,  # (K, B)
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D)
    cosines: Tensor,  # (K, B)
    norms: Tensor,  # (2, K, B)
    dims: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of `a` and `b` in their own dtypes, None where unneeded; numbers beyond all prefixes get zero."""
    across, along = coefficients(d_cosines, cosines, norms)
    gradients = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip((a, b), needs, strict=True)
    ]
    for gradient in gradients:
        if gradient is not None:
            gradient[:, dims[-1] :] = 0.0
    for rows in _parts(a):
        x, y = (up(side[rows]) for side in (a, b))
        for k, place in enumerate(segments(dims)):
            factor = across[k, rows, None]
            for gradient, own, other, by_norm in zip(gradients, (x, y), (y, x), along[:, k], strict=True):
                if gradient is not None:
                    found = other[:, place] * factor
                    gradient[rows, place] = found.addcmul_(own[:, place], by_norm[rows, None], value=-1)
    return gradients


def coefficients(
    d_cosines: Tensor,  # (K, B)
    cosines: Tensor,  # (K, B)
    norms: Tensor,  # (2, K, B)
) -> tuple[Tensor, Tensor]:
    """What a segment's gradient takes of the other row (K, B), and of its own row (2, K, B), for each side."""
    inverse = norms.clamp_min(NORM_FLOOR).reciprocal()
    across = d_cosines * inverse[0] * inverse[1]
    # below the floor the norm is a constant
    along = torch.where(norms < NORM_FLOOR, 0.0, d_cosines * cosines * inverse.square())
    # a segment lies in its own width's prefix and in all longer ones
    add_up_(across, from_the_last=True)
    add_up_(along.transpose(0, 1), from_the_last=True)
    return across, along


def _parts(x: Tensor) -> Iterator[slice]:
    rows = max(_PART_BYTES // max(x.shape[1] * x.element_size(), 1), 1) if x.is_cpu else len(x)
    for start in range(0, len(x), max(rows, 1)):
        yield slice(start, start + rows)
