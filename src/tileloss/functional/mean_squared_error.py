"""The mean squared difference of two matrices, for losses that have a model imitate another.

Its gradient is known as soon as the inputs are read, so that they are read once: the way back hands it over.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tileloss import backend
from tileloss.functional.pairs import paired_distance
from tileloss.functional.second_derivative import gradients_by_definition
from tileloss.similarity import up
from tileloss.tiled.mean_squared_error import mean_squared_error as in_blocks

_WORTH = 1 / 8  # of a number, against one of a similarity in a matrix: PyTorch's own two passes are hard to beat


def mean_squared_error(
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D), or (1, D) for all rows; gets no gradient
) -> Tensor:  # 0-dim
    """The mean of the squared differences over all rows and the width, in at least float32.

    Cost:
        Time O(B D): one read of each input, and one write of the gradient. Memory: the gradient, from the forward on,
        and a block of 2 MB.
    """
    chosen = backend.choose(a, int(a.numel() * _WORTH)).backend
    if chosen == "triton":
        return paired_distance(a, b, metric="squared_euclidean").mean() / a.shape[1]
    if chosen == "reference" or torch.compiler.is_compiling():  # a compiler makes one pass of the definition by itself
        return _definition(a, b)
    return _MeanSquaredError.apply(a, b, torch.is_grad_enabled() and a.requires_grad)


def _definition(a: Tensor, b: Tensor) -> Tensor:
    return F.mse_loss(up(a), up(b if b.shape == a.shape else b.expand_as(a)))


class _MeanSquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, with_gradient: bool) -> Tensor:
        found, ctx.gradient = in_blocks(a, b, with_gradient)
        ctx.save_for_backward(a, b)
        return found

    @staticmethod
    def backward(ctx: Any, d_found: Tensor) -> tuple[Tensor | None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        a, b = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated itself
            return gradients_by_definition(_definition, d_found, (a, b), (True, False))[0], None, None
        if gradient is None:  # once more over a graph that was kept
            gradient = in_blocks(a, b, True)[1]
        # nobody else holds it; and a CPU need not be waited for, to see that nothing is to be done
        is_ready = d_found.is_cpu and d_found == 1.0
        return gradient if is_ready else gradient.mul_(d_found), None, None
