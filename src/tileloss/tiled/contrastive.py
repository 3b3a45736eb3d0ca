"""The in-batch softmax loss over row blocks: bounded memory, gradients ready when the forward returns.

Each direction is a matrix of similarities between two sets of rows; blocks of its rows are computed, turned into the
gradient of their logits in place, and multiplied back into the gradients of both sides. Two walks:

* rows: every direction's normaliser is at hand in its own block of rows, so each matrix costs three GEMMs in all;
* statistics first: with doc_to_query, a row's normaliser needs a whole column, so a first walk collects log-sum-exps
  of rows and columns and a second recomputes the blocks into gradients. query_to_doc and doc_to_query share their
  blocks (four GEMMs instead of six), and the symmetric matrices are walked over their upper triangle (two instead of
  three).

The walks are the same on every device. What happens to a block between its GEMMs is the business of a `Passes` object,
in PyTorch (`tiled/passes.py`) or in Triton (`tileloss.kernels.passes`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tileloss.guide import Guide
from tileloss.similarity import full_precision
from tileloss.spec import ContrastiveSpec
from tileloss.tiled.blocks import rows_per_block
from tileloss.tiled.passes import NEG_INF, Passes, Problem
from tileloss.tiled.similarity import RowwiseCallable, block_similarity
from tileloss.tiled.tile import Tile


class Needs(NamedTuple):
    """Which gradients the caller wants; what nobody wants costs nothing."""

    queries: bool
    docs: bool
    scale: bool


class Result(NamedTuple):
    """The loss (0-dim), statistics (3,) in float32, and the gradients that were asked for (None where not)."""

    loss: Tensor
    stats: Tensor
    d_queries: Tensor | None
    d_docs: Tensor | None
    d_scale: Tensor | None


@dataclass
class Matrix:
    """One direction's similarities: its prepared rows on the left and right, and where their gradients add up."""

    direction: str
    left: Tensor  # (B, D)
    right: Tensor  # (C, D)
    d_left: Tensor | None  # (B, D)
    d_right: Tensor | None  # (C, D)


def contrastive_loss(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (M, D): row i < B is the positive of query i
    scale: float | Tensor,
    spec: ContrastiveSpec,
    doc_ids: Tensor | None,  # (M,)
    mask: Tensor | None,  # (B, M) boolean
    needs: Needs,
    guide: Guide | None = None,
    passes_class: type[Passes] = Passes,
) -> Result:
    """The loss, its statistics and its gradients, as `tileloss.reference.contrastive` defines them.

    Memory beside the inputs: the prepared rows, a gradient for each side that needs one, and one or two blocks of
    similarities of bounded size. Time: three GEMMs of B x M x D, or four with doc_to_query.
    """
    passes = passes_class(Problem(len(queries), len(docs), scale, spec, doc_ids, mask, guide), queries, docs)
    with full_precision(queries.device.type):
        return _Walk(queries, docs, passes, needs).run()


class _Walk:
    """One call: the prepared rows, the gradients under way, and the two walks over the blocks."""

    def __init__(self, queries: Tensor, docs: Tensor, passes: Passes, needs: Needs) -> None:
        self.passes, self.problem, self.needs = passes, passes.problem, needs
        self.queries, self.docs = queries, docs
        self.similarity = block_similarity(self.problem.spec.similarity, passes)
        self.left, self.left_saved = self.similarity.prepare(queries)
        self.right, self.right_saved = self.similarity.prepare(docs)
        self.gradients = any(needs)
        wants_left = needs.queries or needs.scale
        # a query's gradient that only its own block adds to is finished there, and inputs narrower than the sums are
        # spared a sum of B x D
        self.by_block = wants_left and queries.dtype != passes.dtype and not self._has("query_to_query")
        self.d_left = self._zeros(len(queries)) if wants_left and not self.by_block else None
        self.d_right = self._zeros(len(docs)) if needs.docs or needs.scale else None
        self.d_queries = queries.new_empty(queries.shape) if self.by_block and needs.queries else None
        self.left_products: Tensor | float = 0.0  # of the finished blocks: the sum of d_left * left
        self.triangular = self.similarity.symmetric and self._has("doc_to_query")

    def _has(self, direction: str) -> bool:
        return direction in self.problem.spec.directions

    def _zeros(self, rows: int) -> Tensor:
        return torch.zeros(rows, self.queries.shape[1], dtype=self.passes.dtype, device=self.queries.device)

    def run(self) -> Result:
        passes = self.passes
        normaliser = self._statistics_first() if self._has("doc_to_query") else self._rows()
        loss = normaliser.mean()
        top1 = (passes.positive > passes.hardest).to(passes.dtype)
        stats = torch.stack([top1.mean(), passes.positive.mean(), passes.hardest.mean()]).float()
        return Result(loss, stats, *self._finished())

    def _rows(self) -> Tensor:  # (B,)
        """Blocks of rows of all directions at once: softmax, gradient of the logits, gradients of both sides."""
        matrices = self._matrices()
        columns = [len(matrix.right) for matrix in matrices]
        rows = self._rows_per_block(sum(columns) * (1 if self.problem.guide is None else 2))
        buffer = self._buffer(rows * sum(columns))
        normaliser = torch.empty_like(self.passes.positive)
        for start in range(0, self.problem.size, rows):
            stop = min(start + rows, self.problem.size)
            tiles = [Tile(m.direction, start, stop, 0, len(m.right)) for m in matrices]
            block = buffer[: (stop - start) * sum(columns)].view(stop - start, -1)
            blocks = block.split(columns, dim=1)
            saved = [self._fill(m, t, b) for m, t, b in zip(matrices, tiles, blocks, strict=True)]
            normaliser[start:stop], grads = self.passes.softmax_gradient(tiles, block, self.gradients)
            if self.gradients:
                for matrix, tile, grad, kept in zip(matrices, tiles, grads, saved, strict=True):
                    self._pull(matrix, tile, grad, kept)
        return normaliser

    def _statistics_first(self) -> Tensor:  # (B,)
        """Log-sum-exps of all rows and twin columns, then the same blocks again as gradients."""
        size, spec = self.problem.size, self.problem.spec
        like = self.passes.positive.copy_(self.similarity.paired(self.left, self.right[:size]))
        normalisers = torch.full((spec.partitions, size), NEG_INF, dtype=like.dtype, device=like.device)
        by_row, by_twin = normalisers[0], normalisers[-1]
        for matrix in self._matrices():
            for tile, rows, twins in self._normalisers(matrix):
                by_row[tile.rows] = torch.logaddexp(by_row[tile.rows], rows)
                if twins is not None:
                    by_twin[tile.twin_rows] = torch.logaddexp(by_twin[tile.twin_rows], twins)
        if self.gradients:
            for matrix in self._matrices():
                for tile, block in self._blocks(matrix):
                    kept = self._fill(matrix, tile, block)
                    self._pull(matrix, tile, self.passes.gradient(tile, block, by_row, by_twin), kept)
        return normalisers.mean(dim=0)

    def _normalisers(self, matrix: Matrix) -> Iterator[tuple[Tile, Tensor, Tensor | None]]:
        if self.similarity.is_product:
            tile = Tile(matrix.direction, 0, self.problem.size, 0, len(matrix.right), twins=(0, self.problem.size))
            found = self.passes.fused_normalisers(tile, matrix.left, matrix.right)
            if found is not None:
                yield tile, *found
                return
        for tile, block in self._blocks(matrix):
            self._fill(matrix, tile, block)
            yield tile, *self.passes.normalisers(tile, block)

    def _matrices(self) -> list[Matrix]:
        """The matrices of the objective; doc_to_query has none of its own, being the transpose of query_to_doc."""
        size = self.problem.size
        d_positives = self.d_right[:size] if self.d_right is not None else None
        matrices = [Matrix("query_to_doc", self.left, self.right, self.d_left, self.d_right)]
        if self._has("query_to_query"):
            matrices.append(Matrix("query_to_query", self.left, self.left, self.d_left, self.d_left))
        if self._has("doc_to_doc"):
            right, d_right = self.right, self.d_right
            if self.problem.guide is not None:
                right, d_right = self.right[:size], d_positives
            matrices.append(Matrix("doc_to_doc", self.right[:size], right, d_positives, d_right))
        return matrices

    def _blocks(self, matrix: Matrix) -> Iterator[tuple[Tile, Tensor]]:
        """The tiles of one matrix from top to bottom, each with room for its similarities."""
        size, columns = self.problem.size, len(matrix.right)
        rows = self._rows_per_block(self.passes.blocks_held * columns)
        buffer = self.shared_buffer
        for start in range(0, size, rows):
            stop = min(start + rows, size)
            if matrix.direction == "query_to_doc":
                tile = Tile(matrix.direction, start, stop, 0, columns, twins=(0, size))
            elif self.triangular:
                tile = Tile(matrix.direction, start, stop, start, columns, twins=(stop, size))
            else:
                tile = Tile(matrix.direction, start, stop, 0, columns)
            yield tile, buffer[: (stop - start) * (columns - tile.first)].view(stop - start, -1)

    def _fill(self, matrix: Matrix, tile: Tile, block: Tensor) -> object:
        left, right = matrix.left[tile.rows], matrix.right[tile.first : tile.last]
        if matrix.direction == "doc_to_doc" and not self.similarity.symmetric:
            assert isinstance(self.similarity, RowwiseCallable)
            return self.similarity.fill_transposed(block, left, right)
        return self.similarity.fill(block, left, right)

    def _pull(self, matrix: Matrix, tile: Tile, grad: Tensor, kept: object) -> None:
        columns = slice(tile.first, tile.last)
        finishes = self.by_block and matrix.direction == "query_to_doc"
        d_left = self._zeros(tile.stop - tile.start) if finishes else None
        if matrix.d_left is not None:
            d_left = matrix.d_left[tile.rows]
        d_right = matrix.d_right[columns] if matrix.d_right is not None else None
        self.similarity.pull(grad, matrix.left[tile.rows], matrix.right[columns], kept, d_left, d_right)
        if finishes:
            assert d_left is not None
            self._finish_block(tile.rows, d_left)

    def _finish_block(self, rows: slice, d_left: Tensor) -> None:
        """What is left to do with a block's gradient of the prepared queries when no other block adds to it."""
        left = self.left[rows]
        if self.needs.scale:
            self.left_products = self.left_products + sum_of_products(d_left, left)
        if self.d_queries is not None:
            saved = self.left_saved[rows] if self.left_saved is not None else None
            self.d_queries[rows] = self.similarity.finish(d_left, left, saved, self._factor())

    def _rows_per_block(self, columns: int) -> int:
        return rows_per_block(self.problem.size, columns, self.passes.dtype, self.queries.device)

    @functools.cached_property
    def shared_buffer(self) -> Tensor:
        """Room for a block of any matrix: one for all, because the last block of a matrix lives on into the next."""
        columns = [len(matrix.right) for matrix in self._matrices()]
        return self._buffer(max(self._rows_per_block(self.passes.blocks_held * count) * count for count in columns))

    def _buffer(self, entries: int) -> Tensor:
        return torch.empty(entries, dtype=self.passes.dtype, device=self.queries.device)

    def _share(self) -> float:
        """What a logit's gradient, as the passes give it, is of the loss' gradient."""
        return 1.0 / (self.problem.size * self.problem.spec.partitions * self.passes.gradient_unit)

    def _factor(self) -> float | Tensor:
        """What a prepared row's gradient is multiplied by."""
        return self.problem.scale * self._share()

    def _finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the rows as given and of the scale, from those of the prepared rows."""
        d_scale = self._d_scale() * self._share() if self.needs.scale else None
        d_queries, d_docs = self.d_queries, None
        if self.needs.queries and self.d_left is not None:
            d_left = self.similarity.finish(self.d_left, self.left, self.left_saved, self._factor())
            d_queries = d_left.to(self.queries.dtype)
        if self.needs.docs:
            assert self.d_right is not None
            d_right = self.similarity.finish(self.d_right, self.right, self.right_saved, self._factor())
            d_docs = d_right.to(self.docs.dtype)
        return d_queries, d_docs, d_scale

    def _d_scale(self) -> Tensor:
        """The sum over all logits of gradient times similarity."""
        if isinstance(self.similarity, RowwiseCallable):
            return torch.as_tensor(self.similarity.scale_gradient)
        assert self.d_right is not None
        products = sum_of_products(self.d_right, self.right) + self.left_products
        if self.d_left is not None:
            products = products + sum_of_products(self.d_left, self.left)
        return products / self.similarity.degree


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """The sum of all entries of `a * b`, without the product's memory."""
    return torch.dot(a.flatten(), b.to(a.dtype).flatten())
