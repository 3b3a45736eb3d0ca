"""The way back from chosen pairs: a product with a sparse matrix of slopes that has k entries in each row.

Where a loss looks at k products a row, such as the hardest positive's and negative's, its gradient needs no GEMM: the
left rows gather their partners' rows, O(B k D), and the right rows gather the rows that chose them. For the latter the
pairs are sorted by partner, so that each right row is one sum, of its pairs in order: there is no scattering, nothing
to collide, and two runs agree bit by bit. The sums run inside PyTorch's embedding bags, which never store the
gathered rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# rows of a gradient that are summed apart before they are added: enough to keep every core at work
_ROWS_AT_ONCE = 1024


def pull_pairs(
    weights: Tensor,  # (B, k): gradients of the products, zero where there is no pair
    partners: Tensor,  # (B, k) int64: the right row of each pair, always in range
    left: Tensor,  # (B, D) prepared rows
    right: Tensor,  # (C, D) prepared rows
    d_left: Tensor | None,  # (B, D): is added to
    d_right: Tensor | None,  # (C, D): is added to
    *,
    norms: bool = False,
) -> None:
    """Add the gradients of the rows; a side that needs none is None and costs nothing.

    `d_left[i]` gets the sum over k of `weights[i, k] * right[partners[i, k]]`, and `d_right[partners[i, k]]` gets
    `weights[i, k] * left[i]`. With `norms`, for distances |x|^2 + |y|^2 - 2 xy, each pair also takes its weight times
    the row itself from both sides. Both sides may be the same tensors. Sums are in the dtype of what is added to,
    narrower rows are raised to it first.
    """
    if d_left is not None:
        _gather(weights.to(d_left.dtype), partners, left, right.to(d_left.dtype), d_left, norms)
    if d_right is not None:
        _collect(weights.to(d_right.dtype), partners, left.to(d_right.dtype), right, d_right, norms)


def by_partner(
    partners: Tensor,  # (B, k) int64
    count: int,
) -> tuple[Tensor, Tensor]:
    """The places (B * k,) of all pairs, row by row, sorted by partner, and where those of each of `count` begin."""
    partner, pairs = torch.sort(partners.flatten(), stable=True)
    return pairs, torch.searchsorted(partner, torch.arange(count + 1, device=partner.device))


def _gather(weights: Tensor, partners: Tensor, left: Tensor, right: Tensor, d_left: Tensor, norms: bool) -> None:
    for start in range(0, len(d_left), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        chosen = F.embedding_bag(partners[rows], right, mode="sum", per_sample_weights=weights[rows])
        d_left[rows].add_(chosen)
        if norms:
            d_left[rows].addcmul_(left[rows], weights[rows].sum(dim=1, keepdim=True), value=-1)


def _collect(weights: Tensor, partners: Tensor, left: Tensor, right: Tensor, d_right: Tensor, norms: bool) -> None:
    pairs, bounds = by_partner(partners, len(d_right))
    weights = weights.flatten()[pairs]
    sources = pairs // partners.shape[1]
    for rows, members in _runs(bounds):
        first = bounds[rows] - bounds[rows.start]
        d_right[rows].add_(
            F.embedding_bag(sources[members], left, first, mode="sum", per_sample_weights=weights[members])
        )
    if norms:
        # sums of the weights themselves: `segment_reduce` would do it, and is not there on every device
        one = weights.new_ones(1, 1)
        totals = F.embedding_bag(torch.zeros_like(pairs), one, bounds[:-1], mode="sum", per_sample_weights=weights)
        d_right.addcmul_(right, totals, value=-1)


def _runs(
    bounds: Tensor,  # (C + 1,): where the pairs of each right row begin
) -> Iterator[tuple[slice, slice]]:
    """Right rows and the pairs that chose them, some rows at a time; on a GPU all at once, lest the host wait."""
    count = len(bounds) - 1
    step = _ROWS_AT_ONCE if bounds.is_cpu else max(count, 1)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        if step < count:
            yield rows, slice(int(bounds[rows.start]), int(bounds[rows.stop]))
        else:
            yield rows, slice(None)
