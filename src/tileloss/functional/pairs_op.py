"""Paired similarities and distances as a registered operator: `torch.ops.tileloss.pairs`, opaque to `torch.compile`.

Its backward is an operator of its own. When the backward is itself to be differentiated (`create_graph=True`), it runs
through the definition instead, whose graph autograd can follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tileloss import reference
from tileloss.similarity import full_precision, up_dtype
from tileloss.tiled import pairs as tiled


def block_pairs(
    a: Tensor,  # (B, D)
    others: list[Tensor],  # N times (B, D)
    measure: str,
    eps: float,
    backend: str,
) -> Tensor:  # (N, B)
    """The measures by the block algorithm of a backend, as a node of the autograd graph."""
    if torch.compiler.is_compiling():
        return _pairs([a, *others], measure, eps, backend)[0]
    return _Pairs.apply(measure, eps, backend, a, *others)


class _Pairs(torch.autograd.Function):
    """The operator's node for eager calls, which small batches wait for a fraction of the time."""

    @staticmethod
    def forward(ctx: Any, measure: str, eps: float, backend: str, *matrices: Tensor) -> Tensor:
        found, norms = _backend(backend).paired_measure(matrices[0], matrices[1:], measure, eps)
        ctx.settings = measure, eps, backend
        ctx.save_for_backward(*matrices, found, norms)
        return found

    @staticmethod
    def backward(ctx: Any, d_found: Tensor) -> tuple[Tensor | None, ...]:
        measure, eps, backend = ctx.settings
        *matrices, found, norms = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[3:])
        if torch.is_grad_enabled():
            gradients = _through_definition(d_found, matrices, measure, eps, needs)
        else:
            a, *others = matrices
            run = _backend(backend).paired_measure_backward
            gradients = run(d_found, a, others, found, norms, measure, eps, needs)
        return None, None, None, *gradients


@torch.library.custom_op("tileloss::pairs", mutates_args=())
def _pairs(matrices: list[Tensor], measure: str, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    a, *others = matrices
    return _backend(backend).paired_measure(a, others, measure, eps)


@_pairs.register_fake
def _(matrices: list[Tensor], measure: str, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    a = matrices[0]
    found = a.new_empty(len(matrices) - 1, len(a), dtype=_sums_dtype(matrices))
    return found, found.new_empty(len(matrices) if measure in tiled.NORM_CLAMPS else 0, len(a))


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
        return _through_definition(d_found, matrices, ctx.measure, ctx.eps, needs), None, None, None
    gradients = _pairs_backward(d_found, matrices, found, norms, ctx.measure, ctx.eps, needs, ctx.backend)
    return [g if need else None for g, need in zip(gradients, needs, strict=True)], None, None, None


_pairs.register_autograd(_backward, setup_context=_setup_context)


def _through_definition(
    d_found: Tensor,  # (N, B)
    matrices: list[Tensor],
    measure: str,
    eps: float,
    needs: list[bool],
) -> list[Tensor | None]:
    """The gradients as a differentiable function of the inputs, by the definition."""
    # as nodes of their own: the gradient of an input that was computed from another must not flow on into that too
    a, *others = matrices = [x.view_as(x) for x in matrices]
    with full_precision(d_found.device.type):
        found = [reference.paired_measure(a, b, measure, eps) for b in others]
        wanted = [x for x, need in zip(matrices, needs, strict=True) if need]
        gradients = iter(torch.autograd.grad(found, wanted, list(d_found), create_graph=True))
    return [next(gradients) if need else None for need in needs]


def _sums_dtype(matrices: list[Tensor]) -> torch.dtype:
    return torch.float64 if torch.float64 in [x.dtype for x in matrices] else up_dtype(matrices[0].dtype)


def _backend(name: str) -> Any:
    if name == "triton":
        from tileloss.kernels import pairs

        return pairs
    return tiled
