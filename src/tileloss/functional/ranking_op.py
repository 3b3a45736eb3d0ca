"""The ranking loss as a registered operator: `torch.ops.tileloss.ranking`, opaque to `torch.compile`.

Forward returns the loss and its gradient, backward scales it. When the backward is itself to be differentiated
(`create_graph=True`), it runs through the materialised definition instead, whose graph autograd can follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tileloss.reference.ranking import ranking_loss as definition
from tileloss.similarity import up_dtype
from tileloss.tiled import ranking as tiled


@torch.library.custom_op("tileloss::ranking", mutates_args=())
def sorted_loss(
    scores: Tensor,  # (B,), B > 0
    labels: Tensor,  # (B,)
) -> tuple[Tensor, Tensor]:
    """The loss (0-dim) and its gradient (B,), by sorting."""
    return tiled.ranking_loss(scores, labels)


@sorted_loss.register_fake
def _shapes(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    sums = up_dtype(scores.dtype)
    return scores.new_empty((), dtype=sums), scores.new_empty(len(scores), dtype=sums)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, d_loss: Tensor, _: Any) -> tuple[Tensor, None]:
    scores, labels, slopes = ctx.saved_tensors
    if torch.is_grad_enabled():
        # as a node of its own: the gradient must not flow on into what the scores were computed from
        scores = scores.view_as(scores)
        (gradient,) = torch.autograd.grad(definition(scores, labels), scores, d_loss, create_graph=True)
        return gradient, None
    return (slopes * d_loss).to(scores.dtype), None


sorted_loss.register_autograd(_backward, setup_context=_setup_context)
