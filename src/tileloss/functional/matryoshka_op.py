"""The contrastive loss at several prefix widths as a registered operator: `torch.ops.tileloss.matryoshka`.

As `torch.ops.tileloss.contrastive`: the forward returns loss, statistics and gradients, the backward scales them, and
where the backward is itself to be differentiated it runs through the definition.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tileloss import reference, tiled
from tileloss.functional.contrastive import Call
from tileloss.functional.contrastive_op import guide_of, needs_operator, passes_of, ready_gradients, spec_of, wanted
from tileloss.similarity import ready_dtype
from tileloss.tiled import Needs
from tileloss.tiled.matryoshka import matryoshka_contrastive_loss
from tileloss.tiled.prefix_passes import PrefixPasses
from tileloss.tiled.width_by_width import width_by_width


def block_matryoshka(
    call: Call,
    dims: Sequence[int],  # ascending
    weights: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Loss (0-dim) and statistics (K, 3) by the block algorithms of a backend, as a node of the autograd graph."""
    queries, docs, scale, spec, doc_ids, mask, guide = call
    number, tensor = (0.0, scale) if isinstance(scale, Tensor) else (float(scale), None)
    needs = wanted(queries, docs, tensor)
    guide_queries, guide_docs, margin, strategy = guide or (None, None, 0.0, "")
    run = _operator if needs_operator(queries) else _EagerLoss.apply
    loss, stats, *_ = run(
        queries, docs, tensor, doc_ids, mask, guide_queries, guide_docs, float(margin), strategy, number,
        "+".join(spec.directions), spec.partition, spec.hardness or "", spec.hardness_strength, list(dims),
        list(weights), needs, backend,
    )  # fmt: skip
    return loss, stats


def _matryoshka(
    queries: Tensor,
    docs: Tensor,
    scale_tensor: Tensor | None,
    doc_ids: Tensor | None,
    mask: Tensor | None,
    guide_queries: Tensor | None,
    guide_docs: Tensor | None,
    guide_margin: float,
    guide_strategy: str,
    scale: float,
    directions: str,
    partition: str,
    hardness: str,
    hardness_strength: float,
    dims: list[int],
    weights: list[float],
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    spec = spec_of("cosine", directions, partition, hardness, hardness_strength)
    guide = guide_of(guide_queries, guide_docs, guide_margin, guide_strategy)
    scale_ = scale if scale_tensor is None else scale_tensor
    problem = tiled.Problem(len(queries), len(docs), scale_, spec, doc_ids, mask, guide)
    arguments = queries, docs, problem, dims, weights, Needs(*needs), passes_of(backend)
    if _shares_products(queries, docs, backend):
        result = matryoshka_contrastive_loss(*arguments, _prefix_passes(backend))
    else:
        result = width_by_width(*arguments)
    # an operator returns tensors only: a gradient that nobody asked for is an empty one
    d_queries, d_docs, d_scale = (queries.new_empty(0) if g is None else g for g in result[2:])
    if scale_tensor is not None:
        d_scale = d_scale.to(ready_dtype(scale_tensor.dtype))
    return result.loss, result.stats, d_queries, d_docs, d_scale


def _shares_products(queries: Tensor, docs: Tensor, backend: str) -> bool:
    """Whether the widths had better share their products, at the price of a block for each width.

    On tensor cores a GEMM costs less than the traffic of those blocks, also of float32 in halves. Elsewhere GEMMs are
    what takes the time.
    """
    if backend != "triton":
        return True
    from tileloss.kernels import halves

    exact = torch.get_float32_matmul_precision() == "highest" and queries.dtype == docs.dtype == torch.float32
    return exact and not halves.pays(len(queries), len(docs), queries.shape[1], queries.device)


def _prefix_passes(backend: str) -> PrefixPasses:
    if backend == "triton":
        from tileloss.kernels.prefix_passes import TritonPrefixPasses

        return TritonPrefixPasses()
    return PrefixPasses()


_operator = torch.library.custom_op("tileloss::matryoshka", mutates_args=())(_matryoshka)


@_operator.register_fake
def _shapes(queries: Tensor, docs: Tensor, scale_tensor: Tensor | None, *settings: Any) -> tuple[Tensor, ...]:
    dims, _, needs, _ = settings[-4:]
    sums = torch.float64 if torch.float64 in (queries.dtype, docs.dtype) else torch.float32
    gradients = [queries.new_empty(0) for _ in needs]
    for place, (x, need) in enumerate(zip((queries, docs, scale_tensor), needs, strict=True)):
        if need and x is not None:
            gradients[place] = torch.empty(x.shape, dtype=ready_dtype(x.dtype), device=x.device)
    return queries.new_empty((), dtype=sums), queries.new_empty(len(dims), 3, dtype=torch.float32), *gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, margin, strategy, ctx.scale, directions, partition, hardness, strength, dims, weights, ctx.needs, _ = (
        inputs
    )
    ctx.guide_settings = margin, strategy
    ctx.spec = spec_of("cosine", directions, partition, hardness, strength)
    ctx.definition = functools.partial(reference.matryoshka_contrastive_loss, dims=dims, weights=weights)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[2:])


def _backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    return (*ready_gradients(ctx, d_loss), *[None] * 15)


_operator.register_autograd(_backward, setup_context=_setup_context)


class _EagerLoss(torch.autograd.Function):
    """The operator's node for eager calls."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _matryoshka(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)
