"""The mined triplet losses as a registered operator: `torch.ops.tileloss.triplet`, opaque to `torch.compile`.

Forward returns the loss, its statistics and, where it was asked for, the gradient of the embeddings; backward scales
it. When the backward is itself to be differentiated (`create_graph=True`), it runs through the materialised definition
instead, whose graph autograd can follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tileloss.reference.pairwise import pairwise_matrix
from tileloss.reference.triplet import Mined, euclidean_distances
from tileloss.reference.triplet import triplet_loss as definition
from tileloss.similarity import full_precision, ready_dtype, scaled, up_dtype
from tileloss.tiled import triplet as tiled
from tileloss.tiled.mining import Mining


def block_loss(
    embeddings: Tensor,  # (B, D), B > 0
    labels: Tensor,  # (B,)
    mining: str,
    margin: float,
    soft: bool,
    distance: str,
    backend: str,
) -> Mined:
    """The loss and what statistics are made of, by a backend's block algorithms, as a node of the autograd graph."""
    need = torch.is_grad_enabled() and embeddings.requires_grad
    *mined, _ = _triplet(embeddings, labels, mining, margin, soft, distance, need, backend)
    return Mined(*mined)


def materialised_loss(
    embeddings: Tensor,  # (B, D), B > 0
    labels: Tensor,  # (B,)
    mining: str,
    margin: float,
    soft: bool,
    distance: str,
) -> Mined:
    """The same by the definition, with autograd's graph of it."""
    with full_precision(embeddings):
        if distance == "euclidean":
            distances = euclidean_distances(embeddings)
        else:
            distances = pairwise_matrix(embeddings, None, distance, similarity=False)
        return definition(distances, labels, mining, margin, soft)


@torch.library.custom_op("tileloss::triplet", mutates_args=())
def _triplet(
    embeddings: Tensor,
    labels: Tensor,
    mining: str,
    margin: float,
    soft: bool,
    distance: str,
    need: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mining_class = Mining
    if backend == "triton":
        from tileloss.kernels.mining import TritonMining as mining_class
    found = tiled.triplet_loss(embeddings, labels, mining, margin, soft, distance, need, mining_class)
    # an operator returns tensors only: a gradient that nobody asked for is an empty one
    gradient = embeddings.new_empty(0) if found.d_embeddings is None else found.d_embeddings
    return found.loss, found.active, found.hardest_positive, found.hardest_negative, gradient


@_triplet.register_fake
def _shapes(embeddings: Tensor, labels: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    need = settings[-2]
    loss = embeddings.new_empty((), dtype=up_dtype(embeddings.dtype))
    active = embeddings.new_empty((), dtype=torch.int64)
    # by shape, because len() would bind a compiled graph to one batch size
    hardest = [embeddings.new_empty(labels.shape[0], dtype=loss.dtype) for _ in range(2)]
    gradient = torch.empty(embeddings.shape, dtype=ready_dtype(embeddings.dtype), device=embeddings.device)
    return loss, active, *hardest, gradient if need else embeddings.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, labels, *ctx.settings, _, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(embeddings, labels, output[-1])


def _backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    embeddings, labels, found = ctx.saved_tensors
    if torch.is_grad_enabled():
        # as a node of its own: the gradient must not flow on into what the embeddings were computed from
        embeddings = embeddings.view_as(embeddings)
        loss = materialised_loss(embeddings, labels, *ctx.settings).loss
        (gradient,) = torch.autograd.grad(loss, embeddings, d_loss, create_graph=True)
    else:
        gradient = scaled(found, d_loss, embeddings.dtype)
    return gradient, *[None] * 7


_triplet.register_autograd(_backward, setup_context=_setup_context)
