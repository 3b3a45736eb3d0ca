"""Mean and mean square of the similarities within one set of rows, from the smaller of its two Gram matrices.

For similarities that are products of prepared rows X, the matrix S = X X' need not exist when there are more rows than
columns: the sum of S is the square of the sum of the rows, and the sum of its squares is that of G = X' X, D x D. What
the diagonal contributes, a row's squared norm and the square of that, is known row by row and subtracted. With fewer
rows than columns S is the smaller of the two, and its diagonal is set to zero instead, for then the subtraction would
leave few digits.

The way back is one product, whichever it was: S X = X G. Rows are prepared again for it, block by block, so that there
are only the small Gram matrix and a block of rows beside inputs and gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tileloss.similarity import full_precision
from tileloss.tiled import blocks
from tileloss.tiled.block_similarity import block_similarity
from tileloss.tiled.matmul import accumulate, multiply
from tileloss.tiled.rows import Rows
from tileloss.tiled.similarity import Dot

# bytes of rows that are prepared at a time on a CPU: they are read again at once, and had better be in its cache
_PREPARED_BYTES = 1 << 20


class Found(NamedTuple):
    """Both means, 0-dim, and what the way back starts from.

    Attributes:
        mean: of the similarities of different rows.
        second_moment: the mean of their squares.
        gram: (B, B) with a diagonal of zeros, or (D, D) where D < B.
        total: (D,), the sum of the prepared rows.
    """

    mean: Tensor
    second_moment: Tensor
    gram: Tensor
    total: Tensor


def dispersion(
    embeddings: Tensor,  # (B, D), B > 0
    similarity: str,  # one whose entries are products of prepared rows
    rows_class: type[Rows] = Rows,
) -> Found:
    """As `tileloss.reference.dispersion` defines it; one GEMM of B x D x min(B, D)."""
    with full_precision(embeddings):
        measure = block_similarity(similarity, rows_class(embeddings))
        size, width = embeddings.shape
        pairs = max(size * (size - 1), 1)
        if size <= width:
            rows, _ = measure.prepare(embeddings)
            gram = multiply(rows, rows.t(), out=rows.new_empty(size, size)).fill_diagonal_(0.0)
            return Found(gram.sum() / pairs, _square(gram) / pairs, gram, rows.sum(dim=0))
        gram = torch.zeros(width, width, dtype=measure.rows.dtype, device=embeddings.device)
        total, diagonal, diagonal_squares = gram.new_zeros(width), gram.new_zeros(()), gram.new_zeros(())
        half = width // 2
        for block in embeddings.split(_step(embeddings, measure)):
            rows, _ = measure.prepare(block)
            # one of the corners off the diagonal is the other's transpose, and can wait
            accumulate(gram[:half], rows[:, :half].t(), rows)
            accumulate(gram[half:, half:], rows[:, half:].t(), rows[:, half:])
            total += rows.sum(dim=0)
            squares = _squares(rows)
            diagonal += squares.sum()
            diagonal_squares += _square(squares)
        gram[half:, :half] = gram[:half, half:].t()
        return Found((_square(total) - diagonal) / pairs, (_square(gram) - diagonal_squares) / pairs, gram, total)


def dispersion_backward(
    d_mean: Tensor,  # 0-dim
    d_second_moment: Tensor,  # 0-dim
    embeddings: Tensor,  # (B, D), B > 0
    gram: Tensor,  # (B, B) or (D, D)
    total: Tensor,  # (D,)
    similarity: str,
    rows_class: type[Rows] = Rows,
) -> Tensor:  # (B, D)
    """The gradient of the embeddings; one GEMM of B x D x min(B, D)."""
    with full_precision(embeddings):
        measure = block_similarity(similarity, rows_class(embeddings))
        size, width = embeddings.shape
        pairs = max(size * (size - 1), 1)
        # every similarity stands twice in the matrix; its square has twice itself for a derivative
        linear, quadratic = 2 / pairs * d_mean, 4 / pairs * d_second_moment
        gram, total = gram * quadratic, total * linear
        if size <= width:
            rows, saved = measure.prepare(embeddings)
            slopes = accumulate(total.repeat(size, 1), gram, rows).addcmul_(rows, linear, value=-1)
            return measure.finish(slopes, rows, saved, 1.0).to(embeddings.dtype)
        d_embeddings = torch.empty(embeddings.shape, dtype=embeddings.dtype, device=embeddings.device)
        step = _step(embeddings, measure)
        for block, d_block in zip(embeddings.split(step), d_embeddings.split(step), strict=True):
            rows, saved = measure.prepare(block)
            slopes = multiply(rows, gram.t(), out=torch.empty_like(rows)).add_(total)  # which is its own transpose
            slopes.addcmul_(rows, (quadratic * _squares(rows) + linear)[:, None], value=-1)
            d_block.copy_(measure.finish(slopes, rows, saved, 1.0))
    return d_embeddings


def _step(embeddings: Tensor, measure: Dot) -> int:
    size, width = embeddings.shape
    if not embeddings.is_cpu:
        return blocks.rows_per_block(size, width, measure.rows.dtype, embeddings.device)
    return max(_PREPARED_BYTES // (width * measure.rows.dtype.itemsize), blocks.MIN_ROWS["cpu"])


def _square(x: Tensor) -> Tensor:
    """The sum of the squares, 0-dim; as a sum, which PyTorch makes more exactly than a norm of many numbers."""
    return x.square().sum()


def _squares(rows: Tensor) -> Tensor:
    """The squared norm of each row."""
    return torch.linalg.vector_norm(rows, dim=1).square()
