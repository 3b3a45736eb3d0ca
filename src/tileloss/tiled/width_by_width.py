"""The in-batch softmax loss at several prefix widths, one width after the other: nothing is shared but the totals.

For devices on which a GEMM costs less than the traffic of the blocks that shared products need. Each width is a call
of the contrastive driver on the prefixes, so the memory is that of the widest one and of the sums of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tileloss.similarity import ready_dtype
from tileloss.tiled import Needs, Passes, Problem, Result, contrastive_loss


def width_by_width(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (M, D): row i < B is the positive of query i
    problem: Problem,
    dims: Sequence[int],  # ascending
    weights: Sequence[float],
    needs: Needs,
    passes_class: type[Passes] = Passes,
) -> Result:
    """The loss, its statistics (K, 3) and its gradients, as `tileloss.reference.matryoshka` defines them.

    Time: for each width d, three GEMMs of B x M x d, or four with doc_to_query.
    """
    losses, stats = [], []
    totals: list[Tensor | None] = [None, None, None]
    for dim, weight in zip(reversed(dims), reversed(weights), strict=True):
        found = contrastive_loss(
            queries[:, :dim], docs[:, :dim], problem.scale, problem.spec, problem.doc_ids, problem.mask, needs,
            problem.guide, passes_class,
        )  # fmt: skip
        losses.append(found.loss * weight)
        stats.append(found.stats)
        for place, (gradient, x) in enumerate(zip(found[2:], (queries, docs, found.loss), strict=True)):
            if gradient is not None:
                total = totals[place]
                if total is None:  # sums of gradients are made in the dtype of the loss
                    total = totals[place] = torch.zeros(x.shape, dtype=found.loss.dtype, device=x.device)
                (total[:, :dim] if total.ndim else total).add_(gradient, alpha=weight)
    d_queries, d_docs, d_scale = totals
    return Result(
        torch.stack(losses).sum(),
        torch.stack(stats[::-1]),
        d_queries.to(ready_dtype(queries.dtype)) if d_queries is not None else None,
        d_docs.to(ready_dtype(docs.dtype)) if d_docs is not None else None,
        d_scale,
    )
