"""The ranking loss as a node of the autograd graph, and as an operator that is opaque to `torch.compile`.

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


def sorted_loss(
    scores: Tensor,  # (B,), B > 0
    labels: Tensor,  # (B,)
) -> Tensor:
    """The loss (0-dim), by sorting."""
    if torch.compiler.is_compiling():
        return _ranking(scores, labels)[0]
    return _Ranking.apply(scores, labels)


def _gradient(d_loss: Tensor, scores: Tensor, labels: Tensor, slopes: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return (slopes * d_loss).to(scores.dtype)
    # as a node of its own: the gradient must not flow on into what the scores were computed from
    scores = scores.view_as(scores)
    (gradient,) = torch.autograd.grad(definition(scores, labels), scores, d_loss, create_graph=True)
    return gradient


class _Ranking(torch.autograd.Function):
    """The operator's node for eager calls, which small batches wait for a fraction of the time."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, labels: Tensor) -> Tensor:
        loss, slopes = tiled.ranking_loss(scores, labels)
        ctx.save_for_backward(scores, labels, slopes)
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None]:
        return _gradient(d_loss, *ctx.saved_tensors), None


@torch.library.custom_op("tileloss::ranking", mutates_args=())
def _ranking(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return tiled.ranking_loss(scores, labels)


@_ranking.register_fake
def _shapes(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    sums = up_dtype(scores.dtype)
    # by shape, because len() would bind a compiled graph to one batch size
    return scores.new_empty((), dtype=sums), scores.new_empty(scores.shape[0], dtype=sums)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, d_loss: Tensor, _: Any) -> tuple[Tensor, None]:
    return _gradient(d_loss, *ctx.saved_tensors), None


_ranking.register_autograd(_backward, setup_context=_setup_context)
