"""The contrastive loss as a registered operator: `torch.ops.tileloss.contrastive`, opaque to `torch.compile`.

Forward returns loss, statistics and the gradients that were asked for; backward scales them. When the backward is
itself to be differentiated (`create_graph=True`), it runs through the materialised definition instead, whose graph
autograd can follow. An eager call takes the same road as an `autograd.Function`, because PyTorch's way to an operator
of many arguments that is written in Python takes 0.1 ms, which a batch of a few hundred rows feels, and a GPU that
waits for its host. So do a similarity that is a Python function and a batch that is spread over processes, neither of
which can be an operator's argument. All exchange between processes is in the forward. The backward is local, and takes
it for granted that every process multiplies its loss by the same number.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from tileloss import reference, tiled
from tileloss.functional.contrastive_part import definition_of_part
from tileloss.functional.second_derivative import gradients_by_definition
from tileloss.guide import Guide
from tileloss.similarity import ready_dtype, scaled
from tileloss.spec import ContrastiveSpec
from tileloss.tiled import Needs
from tileloss.tiled.part import Part


def block_loss(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (M, D)
    scale: float | Tensor,  # a tensor: 0-dim
    spec: ContrastiveSpec,
    doc_ids: Tensor | None,  # (M,)
    mask: Tensor | None,  # (B, M)
    guide: Guide | None,
    backend: str,
    part: Part | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss (0-dim) and statistics (3,) by the block algorithms of a backend, as a node of the autograd graph."""
    number, tensor = (0.0, scale) if isinstance(scale, Tensor) else (float(scale), None)
    needs = wanted(queries, docs, tensor)
    if part is not None or not isinstance(spec.similarity, str) or not needs_operator(queries):
        passes = passes_of(backend)
        return _EagerLoss.apply(queries, docs, tensor, number, spec, doc_ids, mask, guide, needs, passes, part)
    guide_queries, guide_docs, margin, strategy = guide or (None, None, 0.0, "")
    loss, stats, *_ = _contrastive(
        queries, docs, tensor, doc_ids, mask, guide_queries, guide_docs, float(margin), strategy, number,
        spec.similarity, "+".join(spec.directions), spec.partition, spec.hardness or "", spec.hardness_strength, needs,
        backend,
    )  # fmt: skip
    return loss, stats


def needs_operator(x: Tensor) -> bool:
    """Whether a compiler is at work, or x has a shape and no numbers, as meta and fake tensors do."""
    return torch.compiler.is_compiling() or x.is_meta or type(x) not in (Tensor, nn.Parameter)


@torch.library.custom_op("tileloss::contrastive", mutates_args=())
def _contrastive(
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
    similarity: str,
    directions: str,
    partition: str,
    hardness: str,
    hardness_strength: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    spec = spec_of(similarity, directions, partition, hardness, hardness_strength)
    scale_ = scale if scale_tensor is None else scale_tensor
    guide = guide_of(guide_queries, guide_docs, guide_margin, guide_strategy)
    result = tiled.contrastive_loss(
        queries, docs, scale_, spec, doc_ids, mask, Needs(*needs), guide, passes_of(backend)
    )
    # an operator returns tensors only: a gradient that nobody asked for is an empty one
    d_queries, d_docs, d_scale = (queries.new_empty(0) if g is None else g for g in result[2:])
    if scale_tensor is not None:
        d_scale = d_scale.to(ready_dtype(scale_tensor.dtype))
    return result.loss, result.stats, d_queries, d_docs, d_scale


@_contrastive.register_fake
def _shapes(queries: Tensor, docs: Tensor, scale_tensor: Tensor | None, *settings: Any) -> tuple[Tensor, ...]:
    needs = settings[-2]
    sums = torch.float64 if torch.float64 in (queries.dtype, docs.dtype) else torch.float32
    loss, stats = queries.new_empty((), dtype=sums), queries.new_empty(3, dtype=torch.float32)
    gradients = [queries.new_empty(0) for _ in needs]
    for place, (x, need) in enumerate(zip((queries, docs, scale_tensor), needs, strict=True)):
        if need and x is not None:
            gradients[place] = torch.empty(x.shape, dtype=ready_dtype(x.dtype), device=x.device)
    return loss, stats, *gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, margin, strategy, ctx.scale, similarity, directions, partition, hardness, strength, ctx.needs, _ = inputs
    ctx.guide_settings, ctx.definition = (margin, strategy), reference.contrastive_loss
    ctx.spec = spec_of(similarity, directions, partition, hardness, strength)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[2:])


def _backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    return (*ready_gradients(ctx, d_loss), *[None] * 14)


_contrastive.register_autograd(_backward, setup_context=_setup_context)


class _EagerLoss(torch.autograd.Function):
    """The operator's node for eager calls, also of a row-wise Python function or for a part of a batch."""

    @staticmethod
    def forward(ctx: Any, queries, docs, scale_tensor, scale, spec, doc_ids, mask, guide, needs, passes, part):  # type: ignore[no-untyped-def]
        ctx.scale, ctx.spec, ctx.needs, ctx.definition = scale, spec, needs, reference.contrastive_loss
        if part is not None:
            ctx.definition = functools.partial(definition_of_part, part=part)
        scale = scale if scale_tensor is None else scale_tensor
        loss, stats, *gradients = tiled.contrastive_loss(
            queries, docs, scale, spec, doc_ids, mask, Needs(*needs), guide, passes, part
        )
        guide_queries, guide_docs, *ctx.guide_settings = guide or (None, None, 0.0, "")
        ctx.save_for_backward(queries, docs, scale_tensor, doc_ids, mask, guide_queries, guide_docs, *gradients)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Any) -> tuple[Any, ...]:
        return (*ready_gradients(ctx, d_loss), *[None] * 8)


def ready_gradients(ctx: Any, d_loss: Tensor) -> list[Tensor | None]:
    """Of queries, docs and scale: as the forward found them, scaled; or by the definition where autograd records."""
    queries, docs, scale_tensor, doc_ids, mask, guide_queries, guide_docs, *found = ctx.saved_tensors
    if torch.is_grad_enabled():
        scale = ctx.scale if scale_tensor is None else scale_tensor
        guide = guide_of(guide_queries, guide_docs, *ctx.guide_settings)

        def definition(*inputs: Any) -> Tensor:
            return ctx.definition(*inputs, ctx.spec, doc_ids, mask, guide)[0]

        return gradients_by_definition(definition, d_loss, (queries, docs, scale), ctx.needs)
    return [
        scaled(gradient, d_loss, x.dtype) if need else None
        for gradient, x, need in zip(found, (queries, docs, scale_tensor), ctx.needs, strict=True)
    ]


def wanted(*inputs: Tensor | float | None) -> list[bool]:
    """Which of the inputs are to get a gradient."""
    recording = torch.is_grad_enabled()
    return [recording and isinstance(x, Tensor) and x.requires_grad for x in inputs]


def passes_of(backend: str) -> type[tiled.Passes]:
    """What a block goes through on the backend "tiled" or "triton"."""
    if backend == "triton":
        from tileloss.kernels import TritonPasses

        return TritonPasses
    return tiled.Passes


def spec_of(similarity: str, directions: str, partition: str, hardness: str, strength: float) -> ContrastiveSpec:
    return ContrastiveSpec(similarity, tuple(directions.split("+")), partition, hardness or None, strength)


def guide_of(queries: Tensor | None, docs: Tensor | None, margin: float, strategy: str) -> Guide | None:
    return None if queries is None or docs is None else Guide(queries, docs, margin, strategy)
