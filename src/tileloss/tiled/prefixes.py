"""Rows cut at several prefix widths: the segments between the widths, the norms of all prefixes, and the way back.

The first d numbers of a row are its segments up to d, so the products of prefixes are partial sums over segments, and
so are their squared norms. The gradient of a segment adds up over every prefix that reaches it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tileloss.similarity import NORM_FLOOR
from tileloss.tiled import onednn


@dataclass
class Prefixes:
    """One set of rows under K prefix widths, and the parts of their gradient under way.

    Attributes:
        segments: K times (N, W_k): what width k adds to the width before it.
        columns: K times, where a segment stands in its row.
        inverse: (K, N), one over the prefix' norm, which is clamped at 1e-12.
        slope: (K, N), the square of `inverse`, and zero where the clamp makes the norm a constant.
        gradient: (N, D) of the rows by their products, in any layout, or None where nobody wants it.
        along: (K, N), the sum over a row of each cosine times its gradient, by which the norms answer.
    """

    segments: list[Tensor]
    columns: list[slice]
    inverse: Tensor
    slope: Tensor
    gradient: Tensor | None
    along: Tensor

    @classmethod
    def of(
        cls,
        x: Tensor,  # (N, D)
        dims: Sequence[int],  # ascending
        dtype: torch.dtype,  # of segments and sums
        wanted: bool,  # whether the rows need a gradient
        by_columns: bool = False,  # whether oneDNN may sum the gradient column by column
    ) -> Prefixes:
        """Cut the rows; memory: that of a wanted gradient, and a copy of rows that cannot serve as they are given."""
        columns, x = segments(dims), x.to(dtype).contiguous()
        parts = [x[:, place] for place in columns]
        parts = [part.contiguous() if onednn.serves(part) else part for part in parts]  # which wants them dense
        norms = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts])
        norms = add_up_(norms.square_()).sqrt_()
        inverse = norms.clamp_min(NORM_FLOOR).reciprocal_()
        slope = torch.where(norms < NORM_FLOOR, 0.0, inverse.square())
        gradient = None
        if wanted:
            gradient = x.new_zeros(x.shape[::-1]).t() if by_columns and onednn.serves(x) else x.new_zeros(x.shape)
        return cls(parts, columns, inverse, slope, gradient, torch.zeros_like(inverse))

    def head(self, rows: int) -> Prefixes:
        """The first rows alone, in the same memory."""
        gradient = self.gradient[:rows] if self.gradient is not None else None
        parts = [segment[:rows] for segment in self.segments]
        return Prefixes(
            parts, self.columns, self.inverse[:, :rows], self.slope[:, :rows], gradient, self.along[:, :rows]
        )

    def unit_rows(self, k: int) -> Tensor:  # (N, sum of W up to k)
        """The prefixes of one width over their norms, which is a copy."""
        return torch.cat(self.segments[: k + 1], dim=1).mul_(self.inverse[k, :, None])

    def finish(
        self,
        weights: Tensor,  # (K,)
        factor: float | Tensor,
        dtype: torch.dtype,
    ) -> Tensor:  # (N, D)
        """The gradient of the rows as given, times `factor`: that by the products less that by the norms.

        Memory: a copy, where it is narrower than the sums or the sums are laid out by columns.
        """
        assert self.gradient is not None
        gradient = self.gradient.contiguous()
        # a segment lies in its own width's prefix and in all longer ones
        by_norm = add_up_((self.along * self.slope).mul_(weights[:, None]), from_the_last=True)
        for segment, place, coefficient in zip(self.segments, self.columns, by_norm, strict=True):
            gradient[:, place].addcmul_(segment, coefficient[:, None], value=-1)
        return gradient.mul_(factor).to(dtype)


def segments(dims: Sequence[int]) -> list[slice]:
    """Where in a row stands what each width, in ascending order, adds to the one before it."""
    return [slice(first, last) for first, last in zip((0, *dims), dims, strict=False)]


def add_up_(
    x: Tensor,  # (K, ...)
    *,
    from_the_last: bool = False,
) -> Tensor:  # (K, ...)
    """Sum the first dimension up to each place, in place; `from_the_last`, down to each.

    K is a number of widths. `cumsum`, which would do this too, is refused for CUDA under
    `torch.use_deterministic_algorithms`.
    """
    rows = x.unbind()[::-1] if from_the_last else x.unbind()
    for before, row in itertools.pairwise(rows):
        row += before
    return x
