"""The hardest negatives as a registered operator: `torch.ops.tileloss.hardest`, opaque to `torch.compile`.

Its backward is an operator of its own, because it sorts and sums in ways that a compiler had better not follow. When
the backward is itself to be differentiated (`create_graph=True`), it runs through the materialised definition instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tileloss.reference.hardest import hardest_negatives as definition
from tileloss.similarity import full_precision
from tileloss.tiled import hardest as tiled


@torch.library.custom_op("tileloss::hardest", mutates_args=())
def block_hardest(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (M, D)
    similarity: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hardest similarity (B,), its index (B,) and own similarity (B,), by the block algorithm of a backend."""
    return tiled.hardest_negatives(queries, docs, similarity, _passes(backend))


@block_hardest.register_fake
def _shapes(queries: Tensor, docs: Tensor, similarity: str, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.float64 if torch.float64 in (queries.dtype, docs.dtype) else torch.float32
    # by shape, because len() would bind a compiled graph to one batch size
    hardest, own = (queries.new_empty(queries.shape[0], dtype=sums) for _ in range(2))
    return hardest, queries.new_empty(queries.shape[0], dtype=torch.int64), own


@torch.library.custom_op("tileloss::hardest_backward", mutates_args=())
def _block_hardest_backward(
    d_hardest: Tensor,
    d_own: Tensor,
    queries: Tensor,
    docs: Tensor,
    index: Tensor,
    similarity: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    gradients = tiled.hardest_negatives_backward(
        d_hardest, d_own, queries, docs, index, similarity, needs, _passes(backend)
    )
    # an operator returns tensors only: a gradient that nobody asked for is an empty one
    d_queries, d_docs = (queries.new_empty(0) if g is None else g for g in gradients)
    return d_queries, d_docs


@_block_hardest_backward.register_fake
def _backward_shapes(
    d_hardest: Tensor,
    d_own: Tensor,
    queries: Tensor,
    docs: Tensor,
    index: Tensor,
    similarity: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    d_queries, d_docs = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else queries.new_empty(0)
        for x, need in zip((queries, docs), needs, strict=True)
    )
    return d_queries, d_docs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    queries, docs, ctx.similarity, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(queries, docs, output[1])


def _backward(ctx: Any, d_hardest: Tensor, _: Any, d_own: Tensor) -> tuple[Tensor | None, ...]:
    queries, docs, index = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    if torch.is_grad_enabled():
        return *_through_definition((d_hardest, d_own), queries, docs, ctx.similarity, needs), None, None
    found = torch.ops.tileloss.hardest_backward(
        d_hardest, d_own, queries, docs, index, ctx.similarity, needs, ctx.backend
    )
    return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None


block_hardest.register_autograd(_backward, setup_context=_setup_context)


def _through_definition(
    gradients: tuple[Tensor, Tensor],  # of the hardest (B,) and own (B,) similarities
    queries: Tensor,
    docs: Tensor,
    similarity: str,
    needs: list[bool],
) -> list[Tensor | None]:
    """The gradients as a differentiable function of the inputs, by the materialised definition."""
    # as nodes of their own: the gradient of docs that were computed from queries must not flow on into those too
    queries, docs = queries.view_as(queries), docs.view_as(docs)
    with full_precision(queries):
        hardest, _, own = definition(queries, docs, similarity)
        wanted = [x for x, need in zip((queries, docs), needs, strict=True) if need]
        found = iter(torch.autograd.grad((hardest, own), wanted, gradients, create_graph=True))
    return [next(found) if need else None for need in needs]


def _passes(backend: str) -> type[tiled.HardestPasses]:
    if backend == "triton":
        from tileloss.kernels.hardest import TritonHardest

        return TritonHardest
    return tiled.HardestPasses
