"""Paired cosines of prefixes as a registered operator: `torch.ops.tileloss.prefix_cosines`.

Opaque to `torch.compile`. Its backward is an operator of its own, and runs through the definition where it is itself
to be differentiated (`create_graph=True`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tileloss.functional.second_derivative import gradients_by_definition
from tileloss.reference.prefix_cosines import prefix_cosines as definition
from tileloss.similarity import up_dtype
from tileloss.tiled import prefix_cosines as tiled


@torch.library.custom_op("tileloss::prefix_cosines", mutates_args=())
def block_prefix_cosines(
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D)
    dims: list[int],  # ascending, without repeats
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Cosines (K, B) and norms (2, K, B) by the algorithm of a backend."""
    cosines, norms = _backend(backend).prefix_cosines(a, b, dims)
    return cosines, norms


@block_prefix_cosines.register_fake
def _(a: Tensor, b: Tensor, dims: list[int], backend: str) -> tuple[Tensor, Tensor]:
    sums = torch.promote_types(up_dtype(a.dtype), up_dtype(b.dtype))
    # by shape, because len() would bind a compiled graph to one batch size
    widths, rows = len(dims), a.shape[0]
    return a.new_empty(widths, rows, dtype=sums), a.new_empty(2, widths, rows, dtype=sums)


@torch.library.custom_op("tileloss::prefix_cosines_backward", mutates_args=())
def _block_prefix_cosines_backward(
    d_cosines: Tensor,
    a: Tensor,
    b: Tensor,
    cosines: Tensor,
    norms: Tensor,
    dims: list[int],
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = _backend(backend).prefix_cosines_backward
    # an operator returns tensors only: a gradient that nobody asked for is an empty one
    d_a, d_b = (a.new_empty(0) if g is None else g for g in run(d_cosines, a, b, cosines, norms, dims, needs))
    return d_a, d_b


@_block_prefix_cosines_backward.register_fake
def _(
    d_cosines: Tensor,
    a: Tensor,
    b: Tensor,
    cosines: Tensor,
    norms: Tensor,
    dims: list[int],
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    d_a, d_b = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else a.new_empty(0)
        for x, need in zip((a, b), needs, strict=True)
    )
    return d_a, d_b


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, ctx.dims, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(a, b, *output)


def _backward(ctx: Any, d_cosines: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    a, b, cosines, norms = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    if torch.is_grad_enabled():

        def cosines_of(a: Tensor, b: Tensor) -> Tensor:
            return definition(a, b, ctx.dims).T

        return *gradients_by_definition(cosines_of, d_cosines, (a, b), needs), None, None
    found = _block_prefix_cosines_backward(d_cosines, a, b, cosines, norms, ctx.dims, needs, ctx.backend)
    return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None


block_prefix_cosines.register_autograd(_backward, setup_context=_setup_context)


def _backend(name: str) -> Any:
    if name == "triton":
        from tileloss.kernels import prefix_cosines as kernels

        return kernels
    return tiled
