"""Paired similarities and distances as a registered operator: `torch.ops.tileloss.pairs`, opaque to `torch.compile`.

Its backward is an operator of its own. When the backward is itself to be differentiated (`create_graph=True`), it runs
through the definition instead, whose graph autograd can follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tileloss import reference
from tileloss.functional.second_derivative import gradients_by_definition
from tileloss.tiled import pairs as tiled
from tileloss.tiled.cosines import cosines, cosines_backward


def block_pairs(
    a: Tensor,  # (B, D)
    others: list[Tensor],  # N times (B, D)
    measure: str,
    eps: float,
    backend: str,
) -> Sequence[Tensor]:  # N times (B,)
    """The measures by the block algorithm of a backend, as a node of the autograd graph."""
    if torch.compiler.is_compiling():
        return _pairs([a, *others], measure, eps, backend)[0].unbind()
    if backend == "tiled" and len(others) == 1 and tiled.is_small_cosine(a, others[0], measure):
        return [_Cosines.apply(a, others[0], measure)]
    return _Pairs.apply(measure, eps, backend, a, *others)


class _Pairs(torch.autograd.Function):
    """The operator's node for eager calls, which small batches wait for a fraction of the time."""

    @staticmethod
    def forward(ctx: Any, measure: str, eps: float, backend: str, *matrices: Tensor) -> tuple[Tensor, ...]:
        a, *others = matrices
        found, norms = _backend(backend).paired_measure(a, others, measure, eps)
        ctx.settings = measure, eps, backend
        ctx.save_for_backward(*matrices, *found, *norms)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *d_found: Tensor) -> tuple[Tensor | None, ...]:
        measure, eps, backend = ctx.settings
        count, saved = len(d_found), ctx.saved_tensors
        matrices, found, norms = saved[: count + 1], saved[count + 1 : 2 * count + 1], saved[2 * count + 1 :]
        needs = ctx.needs_input_grad[3:]
        d_found = tuple(map(_with_memory, d_found))
        if torch.is_grad_enabled():
            gradients = _through_definition(d_found, matrices, measure, eps, needs)
        else:
            a, *others = matrices
            run = _backend(backend).paired_measure_backward
            gradients = run(d_found, a, others, found, norms, measure, eps, needs)
        return None, None, None, *gradients


class _Cosines(torch.autograd.Function):
    """The same for one other matrix and a single block."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, measure: str) -> Tensor:
        # a few numbers a row, and neither inputs nor outputs: they need no watch over being written to
        ctx.measure, ctx.known = measure, cosines(a, b, measure)
        ctx.save_for_backward(a, b)
        return ctx.known.found.squeeze(1).clone()

    @staticmethod
    def backward(ctx: Any, d_found: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            return (*_through_definition((d_found,), (a, b), ctx.measure, 0.0, needs), None)
        d_found = _with_memory(d_found)
        return (*cosines_backward(d_found, a, b, ctx.known, ctx.measure, needs), None)


@torch.library.custom_op("tileloss::pairs", mutates_args=())
def _pairs(matrices: list[Tensor], measure: str, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    a, *others = matrices
    found, norms = _backend(backend).paired_measure(a, others, measure, eps)
    if isinstance(found, list):
        none = found[0].new_empty(0, len(a))
        return torch.stack(found), torch.stack(norms) if norms else none
    return found, norms


@_pairs.register_fake
def _(matrices: list[Tensor], measure: str, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    a = matrices[0]
    # by shape, because len() would bind a compiled graph to one batch size
    rows = a.shape[0]
    found = a.new_empty(len(matrices) - 1, rows, dtype=tiled.sums_dtype(matrices))
    return found, found.new_empty(len(matrices) if measure in tiled.NORM_CLAMPS else 0, rows)


@torch.library.custom_op("tileloss::pairs_backward", mutates_args=())
def _pairs_backward(
    d_found: Tensor,
    matrices: list[Tensor],
    found: Tensor,
    norms: Tensor,
    measure: str,
    eps: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    a, *others = matrices
    gradients = _backend(backend).paired_measure_backward(d_found, a, others, found, norms, measure, eps, needs)
    # an operator returns tensors only: a gradient that nobody asked for is an empty one
    return [a.new_empty(0) if gradient is None else gradient for gradient in gradients]


@_pairs_backward.register_fake
def _(d_found: Tensor, matrices: list[Tensor], *settings: Any) -> list[Tensor]:
    needs = settings[-2]
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else x.new_empty(0)
        for x, need in zip(matrices, needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    matrices, ctx.measure, ctx.eps, ctx.backend = inputs
    found, norms = output
    ctx.mark_non_differentiable(norms)
    ctx.save_for_backward(*matrices, found, norms)


def _backward(ctx: Any, d_found: Tensor, _: Any) -> tuple[Any, ...]:
    *matrices, found, norms = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[0])
    if torch.is_grad_enabled():
        return _through_definition(d_found.unbind(), matrices, ctx.measure, ctx.eps, needs), None, None, None
    gradients = _pairs_backward(d_found, matrices, found, norms, ctx.measure, ctx.eps, needs, ctx.backend)
    return [g if need else None for g, need in zip(gradients, needs, strict=True)], None, None, None


_pairs.register_autograd(_backward, setup_context=_setup_context)


def _through_definition(
    d_found: Sequence[Tensor],  # N times (B,)
    matrices: Sequence[Tensor],
    measure: str,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients as a differentiable function of the inputs, by the definition."""

    def definition(a: Tensor, *others: Tensor) -> Tensor:
        return reference.paired_measure(a, torch.stack(others), measure, eps)

    return gradients_by_definition(definition, torch.stack(list(d_found)), matrices, needs)


def _with_memory(x: Tensor) -> Tensor:
    """Zeros without memory, which autograd may hand over, take no operation in place: the same with memory."""
    return x.clone() if x._is_zerotensor() else x


def _backend(name: str) -> Any:
    if name == "triton":
        from tileloss.kernels import pairs

        return pairs
    return tiled
