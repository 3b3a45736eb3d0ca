"""All distances or similarities between two sets of rows, filled in and differentiated block by block.

The result is what the caller asked for and is written where it stays; beside it there are the prepared rows and, on
the way back, blocks of gradients. Nothing of size N x M x D is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tileloss.similarity import full_precision
from tileloss.tiled import blocks
from tileloss.tiled.distance import (
    BLOCK_DISTANCES,
    CosineDistance,
    PreparedRows,
    SquaredEuclideanDistance,
)
from tileloss.tiled.rows import Rows
from tileloss.tiled.similarity import Dot, Manhattan

# the metrics whose block algorithm makes similarities first; it makes distances of the others
_SIMILARITY_FIRST = ("cosine", "dot", "manhattan")


class DotDistance(CosineDistance):
    """Minus the product."""

    product_type = Dot

    def distances_(self, block: Tensor, left_squares: Tensor | None, right_squares: Tensor | None) -> Tensor:
        return block.neg_()


class ManhattanDistance(CosineDistance):
    """The sum of absolute differences; no product gives it, so what stands for products is minus the distances."""

    product_type = Manhattan

    def distances_(self, block: Tensor, left_squares: Tensor | None, right_squares: Tensor | None) -> Tensor:
        return block.neg_()

    def pull(self, slopes: Tensor, left: Tensor, right: Tensor, d_left: Tensor | None, d_right: Tensor | None) -> None:
        room = self.buffer_bytes(left.device)
        columns = len(right) if room is None else max(room // (left.numel() * left.itemsize), 1)
        backward = torch.ops.aten._cdist_backward
        for start in range(0, len(right), columns):
            taken = slice(start, start + columns)
            # for absolute differences the distances themselves are not looked at: any matrix of their shape will do
            part = slopes[:, taken].contiguous()
            if d_left is not None:
                d_left.sub_(backward(part, left, right[taken], 1.0, part))
            if d_right is not None:
                part = part.t().contiguous()
                d_right[taken].sub_(backward(part, right[taken], left, 1.0, part))

    @staticmethod
    def buffer_bytes(device: torch.device) -> int | None:
        """Room for what PyTorch's backward sums from, rows x columns x width; None where it needs no such buffer."""
        return None if device.type == "cpu" else blocks.BLOCK_BYTES["cuda"]


PAIRWISE_DISTANCES = BLOCK_DISTANCES | {"dot": DotDistance, "manhattan": ManhattanDistance}


def pairwise_matrix(
    a: Tensor,  # (N, D)
    b: Tensor | None,  # (M, D); None compares `a` with itself
    metric: str,
    similarity: bool,
) -> Tensor:  # (N, M)
    """As `tileloss.reference.pairwise_matrix`, in blocks of rows; one GEMM for all metrics but Manhattan."""
    with torch.no_grad(), full_precision(a):
        distance, left, right = _prepare(a, b, metric)
        result = torch.empty(len(a), len(right.rows), dtype=distance.dtype, device=a.device)
        for start, stop in _blocks(result):
            block = distance.products(left.rows[start:stop], right.rows, result[start:stop])
            if not (similarity and metric in _SIMILARITY_FIRST):
                distance.distances_(block, _part(left.squares, start, stop), right.squares)
                if similarity:
                    block.neg_()
            if b is None and not _counts_on_the_diagonal(metric, similarity):
                block.diagonal(start).zero_()
    return result


def pairwise_matrix_backward(
    grad: Tensor,  # (N, M), any strides
    a: Tensor,  # (N, D)
    b: Tensor | None,  # (M, D)
    result: Tensor | None,  # (N, M): what `pairwise_matrix` returned; looked at for "euclidean" alone
    metric: str,
    similarity: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `a` and `b` in their dtypes; None for one that is not needed.

    Two GEMMs for two gradients. Memory beside them: a copy of the inputs, and two blocks.
    """
    with torch.no_grad(), full_precision(a):
        distance, left, right = _prepare(a, b, metric)
        d_left = torch.zeros_like(left.rows) if needs[0] else None
        # compared with itself, the rows collect what they get on either side
        d_right = d_left if b is None else torch.zeros_like(right.rows) if needs[1] else None
        factor = 1.0 if similarity == (metric in _SIMILARITY_FIRST) else -1.0
        for start, stop in _blocks(grad):
            slopes = grad[start:stop].to(distance.dtype, copy=True, memory_format=torch.contiguous_format)
            if metric not in _SIMILARITY_FIRST:
                slopes = distance.slopes_(slopes, slopes if result is None else result[start:stop].abs())
            if b is None and not _counts_on_the_diagonal(metric, similarity):
                slopes.diagonal(start).zero_()
            distance.pull(slopes, left.rows[start:stop], right.rows, _part(d_left, start, stop), d_right)
        found_left = None if d_left is None else distance.finish(d_left, left, factor).to(a.dtype)
        if b is None or d_right is None:
            return found_left, None
        return found_left, distance.finish(d_right, right, factor).to(b.dtype)


def _prepare(a: Tensor, b: Tensor | None, metric: str) -> tuple[SquaredEuclideanDistance, PreparedRows, PreparedRows]:
    distance = PAIRWISE_DISTANCES[metric](Rows(a) if b is None else Rows(a, b))
    left = distance.prepare(a)
    return distance, left, left if b is None else distance.prepare(b)


def _counts_on_the_diagonal(metric: str, similarity: bool) -> bool:
    """Whether a row compared with itself gives something else than zero."""
    return metric == "dot" or (metric == "cosine" and similarity)


def _blocks(matrix: Tensor) -> list[tuple[int, int]]:
    """First row and end of each block of a matrix with the shape of this one."""
    count, columns = matrix.shape
    rows = blocks.rows_per_block(count, columns, matrix.dtype, matrix.device)
    return [(start, min(start + rows, count)) for start in range(0, count, rows)]


def _part(x: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if x is None else x[start:stop]
