"""How the gradients of an operator become differentiable: through the materialised definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tileloss.similarity import full_precision


def gradients_by_definition(
    definition: Callable[..., Tensor],
    d_loss: Tensor,
    inputs: Sequence[Tensor | float],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of `definition(*inputs)`, times `d_loss`, as a graph for autograd to follow; None where unneeded.

    Cost: the definition's, forward and backward.
    """
    # as nodes of their own: the gradient of an input that was computed from another must not flow on into that one too
    nodes = [x.view_as(x) if isinstance(x, Tensor) else x for x in inputs]
    with full_precision(d_loss):
        loss = definition(*nodes)
        wanted = [x for x, need in zip(nodes, needs, strict=True) if need and isinstance(x, Tensor)]
        found = iter(torch.autograd.grad(loss, wanted, d_loss, create_graph=True))
    return [next(found) if need else None for need in needs]
