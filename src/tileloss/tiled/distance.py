"""Distances from products, block by block, and the way back to the rows.

Each distance is a function of the product of two prepared rows and of their squared norms: Euclidean
sqrt(|x|^2 + |y|^2 - 2 xy), its square, and cosine 1 - xy of unit rows. A block of products becomes a block of
distances in place; a block of the distances' gradients becomes the gradients of the products in place; two GEMMs, and
for the Euclidean two the norms' part, carry those to the rows.

The difference of squares rounds: two equal rows come out a few units apart in the last place. What lies within
rounding counts as zero, and a Euclidean distance of zero has gradient zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tileloss.metrics import ROUNDING
from tileloss.tiled.rows import Rows
from tileloss.tiled.similarity import Cosine, Dot


class PreparedRows(NamedTuple):
    """Rows as the GEMMs read them, and what belongs to each."""

    rows: Tensor  # (N, D) contiguous
    norms: Tensor | None  # (N, 1): what unit rows were divided by
    squares: Tensor | None  # (N,): squared norms, where the distance depends on them


class SquaredEuclideanDistance:
    """|x - y|^2, by the difference of squares."""

    product_type: type[Dot] = Dot

    def __init__(self, rows: Rows) -> None:
        self.product = self.product_type(rows)
        self.dtype = rows.dtype

    def prepare(
        self,
        x: Tensor,  # (N, D)
    ) -> PreparedRows:
        """The rows and their squared norms, summed in the dtype of the distances."""
        rows, norms = self.product.prepare(x)
        return PreparedRows(rows, norms, self.squares(rows))

    def squares(
        self,
        rows: Tensor,  # (N, D) prepared
    ) -> Tensor | None:  # (N,)
        """Squared norms; None where the distance does not depend on them."""
        rows = rows.to(self.dtype)
        return torch.linalg.vecdot(rows, rows)  # a norm's root would leave no two distances exactly equal

    def products(
        self,
        left: Tensor,  # (R, D) prepared
        right: Tensor,  # (C, D) prepared
        out: Tensor,  # (R, C)
    ) -> Tensor:
        """Write the products of all pairs of rows to `out`: one GEMM."""
        self.product.fill(out, left, right)
        return out

    def distances_(
        self,
        block: Tensor,  # (R, C): products; is overwritten
        left_squares: Tensor | None,  # (R,)
        right_squares: Tensor | None,  # (C,)
    ) -> Tensor:  # (R, C)
        """Products to distances, in place."""
        assert left_squares is not None
        assert right_squares is not None
        torch.sub(right_squares, block, alpha=2, out=block).add_(left_squares[:, None])
        # where two rows nearly meet, so do their norms: the left one's bounds the rounding as well as the sum of both
        # what overflows is near nothing
        rounding = (left_squares * (2 * ROUNDING * torch.finfo(block.dtype).eps)).nan_to_num_(0.0, 0.0)
        return block.masked_fill_(block <= rounding[:, None], 0.0)

    def slopes_(
        self,
        gradient: Tensor,  # (R, C): of the distances; is overwritten
        distances: Tensor,  # (R, C): is overwritten
    ) -> Tensor:  # (R, C)
        """Gradients of the distances to gradients of the products, in place."""
        return gradient.mul_(-2.0)

    def pull(
        self,
        slopes: Tensor,  # (R, C): gradients of the products
        left: Tensor,  # (R, D) prepared
        right: Tensor,  # (C, D) prepared
        d_left: Tensor | None,  # (R, D): is added to
        d_right: Tensor | None,  # (C, D): is added to
    ) -> None:
        """Add the gradients of the prepared rows; a side that needs none is None and costs nothing."""
        self.product.pull(slopes, left, right, None, d_left, d_right)
        if d_left is not None:
            self.pull_norms(slopes.sum(dim=1, dtype=d_left.dtype), left, d_left)
        if d_right is not None:
            self.pull_norms(slopes.sum(dim=0, dtype=d_right.dtype), right, d_right)

    def pull_norms(
        self,
        sums: Tensor,  # (N,) of the slopes of each row
        x: Tensor,  # (N, D) prepared
        dx: Tensor,  # (N, D): is added to
    ) -> None:
        """Add what the squared norms answer for: minus half the sum is a norm's gradient, and 2 x that of its row."""
        dx.addcmul_(x, sums[:, None], value=-1)

    def finish(
        self,
        dx: Tensor,  # (N, D): the gradient of the prepared rows; is overwritten
        prepared: PreparedRows,
        factor: float | Tensor,
    ) -> Tensor:  # (N, D)
        """The gradient of the rows as given, times `factor`."""
        return self.product.finish(dx, prepared.rows, prepared.norms, factor)


class EuclideanDistance(SquaredEuclideanDistance):
    """|x - y|, whose gradient at zero is zero."""

    def distances_(self, block: Tensor, left_squares: Tensor | None, right_squares: Tensor | None) -> Tensor:
        return super().distances_(block, left_squares, right_squares).sqrt_()

    def slopes_(self, gradient: Tensor, distances: Tensor) -> Tensor:
        distances.masked_fill_(distances == 0.0, float("-inf"))
        return gradient.div_(distances).neg_()


class CosineDistance(SquaredEuclideanDistance):
    """1 - xy of unit rows."""

    product_type: type[Dot] = Cosine

    def squares(self, rows: Tensor) -> None:
        return None

    def distances_(self, block: Tensor, left_squares: Tensor | None, right_squares: Tensor | None) -> Tensor:
        return block.neg_().add_(1.0)

    def slopes_(self, gradient: Tensor, distances: Tensor) -> Tensor:
        return gradient.neg_()

    def pull(self, slopes: Tensor, left: Tensor, right: Tensor, d_left: Tensor | None, d_right: Tensor | None) -> None:
        self.product.pull(slopes, left, right, None, d_left, d_right)


BLOCK_DISTANCES: dict[str, type[SquaredEuclideanDistance]] = {
    "cosine": CosineDistance,
    "euclidean": EuclideanDistance,
    "squared_euclidean": SquaredEuclideanDistance,
}
