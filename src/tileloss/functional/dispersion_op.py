"""Dispersion as a registered operator: `torch.ops.tileloss.dispersion`, opaque to `torch.compile`.

Its backward is an operator of its own, a product with the small Gram matrix that the forward leaves behind. When the
backward is itself to be differentiated (`create_graph=True`), it runs through the materialised definition instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tileloss.reference.dispersion import dispersion as definition
from tileloss.similarity import full_precision, up_dtype
from tileloss.tiled import dispersion as tiled
from tileloss.tiled.rows import Rows


@torch.library.custom_op("tileloss::dispersion", mutates_args=())
def gram_dispersion(
    embeddings: Tensor,  # (B, D), B > 0
    similarity: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and mean square of the similarities (0-dim), the smaller Gram matrix, and the sum of the rows (D,)."""
    found = tiled.dispersion(embeddings, similarity, _rows(backend))
    return found.mean, found.second_moment, found.gram, found.total


@gram_dispersion.register_fake
def _shapes(embeddings: Tensor, similarity: str, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size, width = embeddings.shape
    side = size if size <= width else width
    sums = up_dtype(embeddings.dtype)
    mean, second_moment, gram, total = (
        embeddings.new_empty(shape, dtype=sums) for shape in ((), (), (side, side), (width,))
    )
    return mean, second_moment, gram, total


@torch.library.custom_op("tileloss::dispersion_backward", mutates_args=())
def _gram_dispersion_backward(
    d_mean: Tensor,
    d_second_moment: Tensor,
    embeddings: Tensor,
    gram: Tensor,
    total: Tensor,
    similarity: str,
    backend: str,
) -> Tensor:
    return tiled.dispersion_backward(d_mean, d_second_moment, embeddings, gram, total, similarity, _rows(backend))


@_gram_dispersion_backward.register_fake
def _backward_shape(d_mean: Tensor, d_second_moment: Tensor, embeddings: Tensor, *settings: Any) -> Tensor:
    return torch.empty(embeddings.shape, dtype=embeddings.dtype, device=embeddings.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, ctx.similarity, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(embeddings, *output[2:])


def _backward(ctx: Any, d_mean: Tensor, d_second_moment: Tensor, *_: Any) -> tuple[Tensor, None, None]:
    embeddings, gram, total = ctx.saved_tensors
    if torch.is_grad_enabled():
        # as a node of its own: the gradient must not flow on into what the embeddings were computed from
        embeddings = embeddings.view_as(embeddings)
        with full_precision(embeddings):
            means = definition(embeddings, ctx.similarity)
            (gradient,) = torch.autograd.grad(means, embeddings, (d_mean, d_second_moment), create_graph=True)
        return gradient, None, None
    gradient = torch.ops.tileloss.dispersion_backward(
        d_mean, d_second_moment, embeddings, gram, total, ctx.similarity, ctx.backend
    )
    return gradient, None, None


gram_dispersion.register_autograd(_backward, setup_context=_setup_context)


def _rows(backend: str) -> type[Rows]:
    if backend == "triton":
        from tileloss.kernels.rows import TritonRows

        return TritonRows
    return Rows
