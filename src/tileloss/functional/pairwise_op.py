"""Distance and similarity matrices as registered operators: `torch.ops.tileloss.pairwise` and its backward.

The backward is an operator of its own, so that `torch.compile` sees one opaque node each way. When the backward is
itself to be differentiated (`create_graph=True`), it runs through the materialised definition instead, whose graph
autograd can follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tileloss import reference
from tileloss.similarity import full_precision, up_dtype
from tileloss.tiled import pairwise as tiled

# what the way back of a metric starts from beside the rows: cosines are cheap for PyTorch to do without, and in the
# fused kernels they would cost a GEMM
_KEEPS_RESULT = {"tiled": ("euclidean",), "triton": ("euclidean", "cosine")}


def block_matrix(
    a: Tensor,  # (N, D)
    b: Tensor | None,  # (M, D)
    metric: str,
    similarity: bool,
    backend: str,
) -> Tensor:  # (N, M)
    """The matrix by the block algorithms of a backend, as a node of the autograd graph."""
    return _pairwise(a, b, metric, similarity, backend)


@torch.library.custom_op("tileloss::pairwise", mutates_args=())
def _pairwise(a: Tensor, b: Tensor | None, metric: str, similarity: bool, backend: str) -> Tensor:
    if backend == "triton":
        from tileloss.kernels.pairwise import pairwise_matrix

        return pairwise_matrix(a, b, metric, similarity)
    return tiled.pairwise_matrix(a, b, metric, similarity)


@_pairwise.register_fake
def _(a: Tensor, b: Tensor | None, metric: str, similarity: bool, backend: str) -> Tensor:
    # by shape, because len() would bind a compiled graph to one batch size
    return a.new_empty(a.shape[0], (a if b is None else b).shape[0], dtype=up_dtype(a.dtype))


@torch.library.custom_op("tileloss::pairwise_backward", mutates_args=())
def _pairwise_backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor | None,
    result: Tensor | None,
    metric: str,
    similarity: bool,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    wanted = needs[0], needs[1]
    if backend == "triton":
        from tileloss.kernels.pairwise_backward import pairwise_matrix_backward

        found = pairwise_matrix_backward(grad, a, b, result, metric, similarity, wanted)
    else:
        found = tiled.pairwise_matrix_backward(grad, a, b, result, metric, similarity, wanted)
    # an operator returns tensors only: a gradient that nobody asked for is an empty one
    d_a, d_b = (a.new_empty(0) if x is None else x for x in found)
    return d_a, d_b


@_pairwise_backward.register_fake
def _(grad: Tensor, a: Tensor, b: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
    needs = settings[-2]
    d_a, d_b = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need and x is not None else a.new_empty(0)
        for x, need in zip((a, b), needs, strict=True)
    )
    return d_a, d_b


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, *ctx.settings, ctx.backend = inputs
    metric = ctx.settings[0]
    ctx.save_for_backward(a, b, output if metric in _KEEPS_RESULT[ctx.backend] else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    a, b, result = ctx.saved_tensors
    metric, similarity = ctx.settings
    needs = [need and x is not None for need, x in zip(ctx.needs_input_grad, (a, b), strict=False)]
    if torch.is_grad_enabled():
        found = _through_definition(grad, a, b, metric, similarity, needs)
    else:
        found = _pairwise_backward(grad, a, b, result, metric, similarity, needs, ctx.backend)
    return (*(x if need else None for x, need in zip(found, needs, strict=True)), None, None, None)


_pairwise.register_autograd(_backward, setup_context=_setup_context)


def _through_definition(
    grad: Tensor,
    a: Tensor,
    b: Tensor | None,
    metric: str,
    similarity: bool,
    needs: list[bool],
) -> list[Tensor | None]:
    """The gradients as a differentiable function of `grad` and the rows, by the materialised definition."""
    # as nodes of their own: the gradient of an input that was computed from the other must not flow on into that too
    a, b = a.view_as(a), None if b is None else b.view_as(b)
    with full_precision(grad):
        matrix = reference.pairwise_matrix(a, b, metric, similarity)
        wanted = [x for x, need in zip((a, b), needs, strict=True) if need and x is not None]
        found = iter(torch.autograd.grad(matrix, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needs]
