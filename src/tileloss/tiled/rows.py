"""Rows before the GEMMs and after them: dtypes, unit norms, and the way back through the norms."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tileloss.similarity import NORM_FLOOR, up, up_dtype


class Rows:
    """How a backend reads rows of embeddings: in PyTorch, raised to float32, or float64 if any of the inputs is.

    Attributes:
        dtype: of sums, maxima, similarities and the gradients of shared rows.
        operand_dtype: of the rows that GEMMs read.
        in_halves: whether cosines of float32 rows are multiplied as `tileloss.tiled.halves` does it.
    """

    in_halves = False

    def __init__(self, *inputs: Tensor) -> None:
        self.dtype = functools.reduce(torch.promote_types, (up_dtype(x.dtype) for x in inputs))
        self.operand_dtype = self.dtype

    def unit_rows(
        self,
        x: Tensor,  # (N, D)
        floor: float = NORM_FLOOR,
    ) -> tuple[Tensor, Tensor]:
        """The rows over their norms, (N, D) in the operands' dtype, and the norms (N, 1), clamped at `floor`."""
        x = up(x)
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return (x / norms.clamp_min(floor)).to(self.operand_dtype), norms

    def unit_rows_backward(
        self,
        dx: Tensor,  # (N, D): the gradient of the unit rows; is overwritten
        x: Tensor,  # (N, D): the unit rows
        norms: Tensor,  # (N, 1)
        factor: float | Tensor,
        floor: float = NORM_FLOOR,
    ) -> Tensor:  # (N, D)
        """The gradient of the rows as given, times `factor`."""
        x = x.to(dx.dtype)
        along = torch.einsum("nd,nd->n", dx, x)[:, None]
        along = torch.where(norms < floor, 0.0, along)  # below the floor the norm is a constant
        return dx.addcmul_(x, along, value=-1).mul_(factor / norms.clamp_min(floor))

    def halves(
        self,
        x: Tensor,  # (R, C) float32
    ) -> Tensor:  # (2, R, C) float16
        """The nearest float16, and what that leaves times `tileloss.tiled.halves.LOW_SCALE`."""
        raise NotImplementedError("only rows that are multiplied in halves are asked for them")
