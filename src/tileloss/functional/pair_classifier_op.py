"""The classifier over pairs as a registered operator: `torch.ops.tileloss.pair_logits`, opaque to `torch.compile`.

Its backward is an operator of its own. When the backward is itself to be differentiated (`create_graph=True`), it runs
through the materialised definition instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tileloss.reference.pair_classifier import PairParts
from tileloss.reference.pair_classifier import pair_logits as definition
from tileloss.similarity import full_precision
from tileloss.tiled import pair_classifier as tiled


def block_pair_logits(
    first: Tensor,  # (B, D)
    second: Tensor,  # (B, D)
    weight: Tensor,  # (C, K D)
    bias: Tensor | None,  # (C,)
    parts: PairParts,
) -> Tensor:  # (B, C)
    """The logits over row blocks, as a node of the autograd graph."""
    if torch.compiler.is_compiling():
        return _pair_logits(first, second, weight, bias, list(parts))
    return _PairLogits.apply(first, second, weight, bias, parts)


class _PairLogits(torch.autograd.Function):
    """The operator's node for eager calls, which small batches wait for a fraction of the time."""

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None, parts: PairParts
    ) -> Tensor:
        ctx.parts = parts
        ctx.save_for_backward(first, second, weight, bias)
        return tiled.pair_logits(first, second, weight, bias, parts)

    @staticmethod
    def backward(ctx: Any, d_logits: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, d_logits, tiled.pair_logits_backward)


@torch.library.custom_op("tileloss::pair_logits", mutates_args=())
def _pair_logits(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None, parts: list[bool]) -> Tensor:
    return tiled.pair_logits(first, second, weight, bias, PairParts(*parts))


@_pair_logits.register_fake
def _shapes(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None, parts: list[bool]) -> Tensor:
    return weight.new_empty(first.shape[0], weight.shape[0])


@torch.library.custom_op("tileloss::pair_logits_backward", mutates_args=())
def _pair_logits_backward(
    d_logits: Tensor, first: Tensor, second: Tensor, weight: Tensor, parts: list[bool], needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = tiled.pair_logits_backward(d_logits, first, second, weight, PairParts(*parts), needs)
    # an operator returns tensors only: a gradient that nobody asked for is an empty one
    d_first, d_second, d_weight, d_bias = (d_logits.new_empty(0) if g is None else g for g in found)
    return d_first, d_second, d_weight, d_bias


@_pair_logits_backward.register_fake
def _backward_shapes(
    d_logits: Tensor, first: Tensor, second: Tensor, weight: Tensor, parts: list[bool], needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    likes = ((first.shape, first), (second.shape, second), (weight.shape, weight), (weight.shape[:1], weight))
    d_first, d_second, d_weight, d_bias = (
        torch.empty(shape, dtype=x.dtype, device=x.device) if need else d_logits.new_empty(0)
        for (shape, x), need in zip(likes, needs, strict=True)
    )
    return d_first, d_second, d_weight, d_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, weight, bias, ctx.parts = inputs
    ctx.save_for_backward(first, second, weight, bias)


def _backward(ctx: Any, d_logits: Tensor, run: Callable[..., Sequence[Tensor | None]]) -> tuple[Tensor | None, ...]:
    first, second, weight, bias = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    if torch.is_grad_enabled():
        return *_through_definition(d_logits, (first, second, weight, bias), ctx.parts, needs), None
    found = run(d_logits, first, second, weight, ctx.parts, needs)
    return *(g if need else None for g, need in zip(found, needs, strict=True)), None


_pair_logits.register_autograd(
    lambda ctx, d_logits: _backward(ctx, d_logits, _pair_logits_backward), setup_context=_setup_context
)


def _through_definition(
    d_logits: Tensor,  # (B, C)
    inputs: Sequence[Tensor | None],  # first, second, weight, bias
    parts: list[bool],
    needs: list[bool],
) -> list[Tensor | None]:
    """The gradients as a differentiable function of the inputs, by the materialised definition."""
    # as nodes of their own: the gradient of a second that was computed from the first must not flow on into that too
    own: list[Any] = [None if x is None else x.view_as(x) for x in inputs]
    first, second, weight, bias = own
    with full_precision(d_logits):
        logits = definition(first, second, weight, bias, PairParts(*parts))
        wanted = [x for x, need in zip(own, needs, strict=True) if need]
        found = iter(torch.autograd.grad(logits, wanted, d_logits, create_graph=True))
    return [next(found) if need else None for need in needs]
