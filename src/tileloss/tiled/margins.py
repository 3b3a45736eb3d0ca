"""By how much a row's dot product with one matrix exceeds that with another, over blocks that stay in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tileloss.tiled.pairs import row_blocks, sums_dtype


def dot_margins(
    queries: Tensor,  # (B, D)
    positives: Tensor,  # (B, D)
    negatives: Tensor,  # (B, D)
) -> Tensor:  # (B,)
    """As `tileloss.functional.margins` defines them."""
    dtype = sums_dtype((queries, positives, negatives))
    blocks = row_blocks(queries, dtype)
    margins = torch.empty(len(queries), dtype=dtype, device=queries.device)
    scratch = torch.empty(blocks[0].stop, queries.shape[1], dtype=dtype, device=queries.device)
    for rows in blocks:
        room = scratch[: rows.stop - rows.start]
        difference = torch.sub(positives[rows].to(dtype), negatives[rows].to(dtype), out=room)
        torch.sum(difference.mul_(queries[rows]), dim=1, out=margins[rows])
    return margins


def dot_margins_backward(
    d_margins: Tensor,  # (B,)
    queries: Tensor,  # (B, D)
    positives: Tensor,  # (B, D)
    negatives: Tensor,  # (B, D)
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of queries, positives and negatives, each in the dtype of its matrix."""
    dtype, matrices = d_margins.dtype, (queries, positives, negatives)
    gradients = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip(matrices, needs, strict=True)
    ]
    d_queries, d_positives, d_negatives = gradients
    for rows in row_blocks(queries, dtype):
        factors = d_margins[rows, None]
        if d_queries is not None:
            target = d_queries[rows]
            # where the gradient is narrower than the sums, the difference is made beside it
            out = target if target.dtype == dtype else None
            difference = torch.sub(positives[rows].to(dtype), negatives[rows].to(dtype), out=out)
            torch.mul(difference, factors, out=target)
        if d_positives is not None:
            torch.mul(queries[rows], factors, out=d_positives[rows])
        if d_negatives is not None:
            torch.mul(queries[rows], -factors, out=d_negatives[rows])
    return gradients
