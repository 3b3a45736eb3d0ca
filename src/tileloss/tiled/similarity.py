"""Similarities of a block of rows, and the way back: from the block's gradient to the rows' gradients.

A block similarity prepares the rows once (`prepare`), fills blocks of similarities (`fill`), turns a block's gradient
into contributions to the gradients of the prepared rows (`pull`), and carries those back through the preparation
(`finish`). `degree` is the degree of homogeneity in both arguments together, which gives the gradient of the scale
from the gradients of the rows (Euler's theorem) without another look at the blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tileloss.similarity import COSINE_FLOOR, NORM_FLOOR, SimilarityFn
from tileloss.tiled.matmul import accumulate, multiply
from tileloss.tiled.rows import Rows

# rows at a time when only pairs are wanted: enough for a product a row, few for a block of which the diagonal is kept
PAIRED_ROWS, _PAIRED_BLOCK = 4096, 64


class Dot:
    """Dot products: one GEMM forward, one for each side backward."""

    is_product = True  # similarities are products of the prepared rows, so a GEMM's epilogue can see them
    symmetric = True
    degree = 2

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def prepare(
        self,
        x: Tensor,  # (N, D)
    ) -> tuple[Tensor, Tensor | None]:
        """The rows as the GEMMs read them, (N, D) contiguous, and what `finish` needs to know of them."""
        return x.to(self.rows.operand_dtype).contiguous(), None

    def values(
        self,
        x: Tensor,  # (N, D) prepared
    ) -> Tensor:  # (N, D)
        """The numbers that prepared rows stand for."""
        return x

    def left_operand(
        self,
        x: Tensor,  # (N, D) prepared
    ) -> Tensor:
        """What a GEMM multiplies with prepared rows on its right."""
        return x

    def fill(
        self,
        out: Tensor,  # (R, C)
        x: Tensor,  # (R, D)
        y: Tensor,  # (C, D)
    ) -> Any:
        """Write the similarities of `x` with `y` to `out`; returns what `pull` needs beside the block's gradient."""
        multiply(x, y.t(), out=out)

    def paired(
        self,
        x: Tensor,  # (N, D)
        y: Tensor,  # (N, D)
    ) -> Tensor:  # (N,)
        """The similarity of each row with its counterpart."""
        pairs = zip(x.split(PAIRED_ROWS), y.split(PAIRED_ROWS), strict=True)
        return torch.cat([(a.to(self.rows.dtype) * b.to(self.rows.dtype)).sum(dim=1) for a, b in pairs])

    def pull(
        self,
        grad: Tensor,  # (R, C)
        x: Tensor,  # (R, D)
        y: Tensor,  # (C, D)
        saved: Any,
        dx: Tensor | None,  # (R, D): is added to
        dy: Tensor | None,  # (C, D): is added to
    ) -> None:
        """Add the gradients of the prepared rows; a side that needs none is None and costs nothing."""
        if dx is not None:
            accumulate(dx, grad, y)
        if dy is not None:
            accumulate(dy, grad.t(), x)

    def finish(
        self,
        dx: Tensor,  # (N, D): is overwritten
        x: Tensor,  # (N, D)
        saved: Tensor | None,
        factor: float | Tensor,
    ) -> Tensor:  # (N, D)
        """The gradient of the rows as given, times `factor`."""
        return dx.mul_(factor)


class Cosine(Dot):
    """Dot products of unit rows; a norm below the floor is taken for the floor, a constant."""

    floor = NORM_FLOOR

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows.unit_rows(x, self.floor)

    def finish(self, dx: Tensor, x: Tensor, saved: Tensor | None, factor: float | Tensor) -> Tensor:
        assert saved is not None
        return self.rows.unit_rows_backward(dx, x, saved, factor, self.floor)


class TorchCosine(Cosine):
    """As `Cosine`, with the floor of `torch.nn.functional.cosine_similarity`."""

    floor = COSINE_FLOOR


class _NoProduct(Dot):
    """What similarities that no single GEMM gives have in common: rows of the sums' dtype, pairs from small blocks."""

    is_product = False

    def prepare(self, x: Tensor) -> tuple[Tensor, None]:
        return x.to(self.rows.dtype).contiguous(), None

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        found = []
        for a, b in zip(x.split(_PAIRED_BLOCK), y.split(_PAIRED_BLOCK), strict=True):
            block = torch.empty(len(a), len(b), dtype=self.rows.dtype, device=x.device)
            self.fill(block, a, b)
            found.append(block.diagonal())
        return torch.cat(found)


class Euclidean(_NoProduct):
    """Negative Euclidean distances; the gradient needs one GEMM a side, and is zero at distance zero."""

    degree = 1

    def fill(self, out: Tensor, x: Tensor, y: Tensor) -> Tensor:
        distances = torch.cdist(x, y)
        torch.neg(distances, out=out)
        return distances

    def pull(self, grad: Tensor, x: Tensor, y: Tensor, saved: Any, dx: Tensor | None, dy: Tensor | None) -> None:
        # d(-|x - y|)/dx = -(x - y)/|x - y|, so with w = grad/|x - y| the sum over y is  w y - (sum of w) x
        weights = torch.where(saved > 0, grad / saved, 0.0)
        super().pull(weights, x, y, None, dx, dy)
        if dx is not None:
            dx.addcmul_(x, weights.sum(1, keepdim=True), value=-1)
        if dy is not None:
            dy.addcmul_(y, weights.sum(0)[:, None], value=-1)


class Manhattan(_NoProduct):
    """Negative Manhattan distances, through PyTorch's own distance kernels in both directions."""

    degree = 1

    def fill(self, out: Tensor, x: Tensor, y: Tensor) -> Tensor:
        distances = torch.cdist(x, y, p=1.0)
        torch.neg(distances, out=out)
        return distances

    def pull(self, grad: Tensor, x: Tensor, y: Tensor, saved: Any, dx: Tensor | None, dy: Tensor | None) -> None:
        backward = torch.ops.aten._cdist_backward
        if dx is not None:
            dx.sub_(backward(grad.contiguous(), x, y, 1.0, saved))
        if dy is not None:
            dy.sub_(backward(grad.t().contiguous(), y, x, 1.0, saved.t().contiguous()))


class RowwiseCallable(_NoProduct):
    """Any similarity that declares itself row-wise: autograd inside each block, nothing kept between blocks.

    It need not be symmetric or homogeneous, so no block stands for its transpose, and the scale's gradient is summed
    block by block in `scale_gradient`.
    """

    symmetric = False
    degree = 0

    def __init__(self, rows: Rows, similarity: SimilarityFn) -> None:
        super().__init__(rows)
        self.similarity = similarity
        self.scale_gradient: Tensor | float = 0.0

    def fill(self, out: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            similarities = self.similarity(x, y)
        out.copy_(similarities.detach())
        return x, y, similarities

    def fill_transposed(self, out: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `fill`, with `y` as the first argument of the callable and its result transposed."""
        y, x, similarities = self.fill(out.t(), y, x)
        with torch.enable_grad():
            return x, y, similarities.t()

    def pull(self, grad: Tensor, x: Tensor, y: Tensor, saved: Any, dx: Tensor | None, dy: Tensor | None) -> None:
        x, y, similarities = saved
        self.scale_gradient = self.scale_gradient + (grad * similarities.detach()).sum()
        gradients = torch.autograd.grad(similarities, (x, y), grad.to(similarities.dtype))
        for total, gradient in zip((dx, dy), gradients, strict=True):
            if total is not None:
                total.add_(gradient)
