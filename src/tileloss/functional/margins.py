"""By how much a query's dot product with its positive exceeds that with its negative.

The difference of two products is one product with a difference: fewer numbers to hold and to add, and no digits lost
where both products are large and close.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tileloss import backend
from tileloss.functional.pairs import aligned_rows, paired_columns
from tileloss.functional.second_derivative import gradients_by_definition
from tileloss.similarity import full_precision, up
from tileloss.tiled import margins as tiled

# of a number, against one of a similarity in a matrix. On a CPU the definition is the faster one at 700 rows of
# 768, and as fast at 2,000
_WORTH, _WORTH_ON_CPU = 1 / 4, 1 / 16


def dot_margins(
    queries: Tensor,  # (B, D)
    positives: Tensor,  # (B, D)
    negatives: Tensor,  # (B, D)
) -> Tensor:  # (B,)
    """queries . (positives - negatives), row by row: float64 if any input is, else float32.

    Raises:
        ShapeError, DtypeError, DeviceError: for inputs that do not fit, before any work.

    Cost:
        Time O(B D): one read of each input forward; backward one of each and one write of each gradient. Memory beside
        inputs and gradients: a few numbers a row, and a block of a few MB on a CPU.
    """
    queries, positives, negatives = aligned_rows(queries, (positives, negatives))
    worth = _WORTH_ON_CPU if queries.is_cpu else _WORTH
    chosen = backend.choose(queries, int(queries.numel() * worth)).backend if queries.numel() else "reference"
    if chosen == "triton":
        to_positive, to_negative = paired_columns(queries, (positives, negatives), "dot")
        return to_positive - to_negative
    if chosen == "reference" or torch.compiler.is_compiling():  # a compiler makes one pass of the definition by itself
        with full_precision(queries):
            return _definition(queries, positives, negatives)
    return _DotMargins.apply(queries, positives, negatives)


def _definition(queries: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    return (up(queries) * (up(positives) - up(negatives))).sum(dim=1)


class _DotMargins(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *matrices: Tensor) -> Tensor:
        ctx.save_for_backward(*matrices)
        return tiled.dot_margins(*matrices)

    @staticmethod
    def backward(ctx: Any, d_margins: Tensor) -> tuple[Tensor | None, ...]:
        queries, positives, negatives = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated itself
            return tuple(gradients_by_definition(_definition, d_margins, (queries, positives, negatives), needs))
        return tuple(tiled.dot_margins_backward(d_margins, queries, positives, negatives, needs))
