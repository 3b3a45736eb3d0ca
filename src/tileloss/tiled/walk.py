"""The walks over the blocks of the in-batch softmax loss: rows with their normalisers at hand, or statistics first.

`tiled/contrastive.py` says when which is taken. What happens to a block between its GEMMs is the business of a
`Passes` object; where the rows and columns of a batch are that is spread over processes, that of a `Part`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tileloss.similarity import ready_dtype
from tileloss.tiled.block_similarity import block_similarity
from tileloss.tiled.blocks import fit_one_block, rows_per_block
from tileloss.tiled.part import Part
from tileloss.tiled.passes import NEG_INF, Passes
from tileloss.tiled.similarity import RowwiseCallable
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
    left: Tensor  # (R, D): rows `top` to `top` + R of the whole batch
    right: Tensor  # (C, D): columns `first` to `last`
    d_left: Tensor | None  # (R, D)
    d_right: Tensor | None  # (C, D)
    top: int = 0
    first: int = 0

    @property
    def last(self) -> int:
        return self.first + len(self.right)

    def rows(self, tile: Tile) -> slice:
        """The tile's rows, in the numbering of `left`."""
        return slice(tile.start - self.top, tile.stop - self.top)

    def columns(self, tile: Tile) -> slice:
        """The tile's columns, in the numbering of `right`."""
        return slice(tile.first - self.first, tile.last - self.first)


class Walk:
    """One call: the prepared rows, the gradients under way, and the two walks over the blocks."""

    finishes_rows = True  # a block of rows meets all of its columns at once

    def __init__(self, queries: Tensor, docs: Tensor, passes: Passes, needs: Needs, part: Part) -> None:
        self.passes, self.problem, self.needs, self.part = passes, passes.problem, needs, part
        self.queries, self.docs = queries, docs
        self.similarity = block_similarity(self.problem.spec.similarity, passes)
        self.left, self.left_saved = self.similarity.prepare(queries)
        self.right, self.right_saved = self.similarity.prepare(docs)
        self.gradients = any(needs)
        wants_left = needs.queries or needs.scale
        # a query's gradient that only its own block adds to is finished there: where it is narrower than sums are, one
        # of B x D is spared
        narrow = ready_dtype(queries.dtype) != passes.dtype and not self._has("query_to_query")
        self.by_block = wants_left and narrow and self.finishes_rows
        self.d_queries = queries.new_empty(queries.shape) if self.by_block and needs.queries else None
        self.left_products: Tensor | float = 0.0  # of the finished blocks: the sum of d_left * left
        self.triangular = self.similarity.symmetric and self._has("doc_to_query") and part.is_whole
        self._lay_out(wants_left and not self.by_block, needs.docs or needs.scale)
        self.filled: dict[str, Tensor] = {}  # blocks that the first walk leaves to the second

    def _lay_out(self, wants_left: bool, wants_right: bool) -> None:
        """Rows that are columns somewhere come together from all processes, and their gradients' sums with them."""
        part = self.part
        self.candidates = self.left  # the right side of query_to_query; a guide leaves it to each process
        self.gathers_queries = self._has("query_to_query") and self.problem.guide is None
        if self.gathers_queries:
            self.candidates = part.gathered(self.left)
            self.left = self.candidates[part.rows]
        self.right = part.gathered(self.right)
        self.d_candidates = self._zeros(len(self.candidates)) if wants_left else None
        self.d_left = self.d_candidates
        if self.gathers_queries and self.d_candidates is not None:
            self.d_left = self.d_candidates[part.rows]
        self.d_right = self._zeros(len(self.right)) if wants_right else None
        self.positives = part.rows  # where among the right rows those of the queries here are

    def _gather_back(self) -> None:
        """Bring the gradients' sums to the processes whose rows they are of."""
        part = self.part
        if self.gathers_queries and self.d_candidates is not None:
            self.d_left = self.d_candidates = part.returned(self.d_candidates)
        if self.d_right is not None:
            self.d_right = part.returned(self.d_right)
        self.right = part.own(self.right)

    def _has(self, direction: str) -> bool:
        return direction in self.problem.spec.directions

    def _zeros(self, rows: int) -> Tensor:
        return torch.zeros(rows, self.queries.shape[1], dtype=self.passes.dtype, device=self.queries.device)

    def run(self) -> Result:
        """The loss of the rows that are here, so that the mean over the processes is the loss of the batch."""
        passes, part = self.passes, self.part
        normaliser = self._walk()
        loss = normaliser.sum() * part.processes / self.problem.size
        positive, hardest = passes.positive[part.rows], passes.hardest[part.rows]
        top1 = (positive > hardest).to(passes.dtype)
        stats = torch.stack([top1.mean(), positive.mean(), hardest.mean()]).float()
        return Result(loss, stats, *self._finished())

    def _walk(self) -> Tensor:  # (B,)
        """The normalisers of the rows that are here; the gradients add up on the way."""
        return self._statistics_first() if self._has("doc_to_query") else self._rows()

    def _rows(self) -> Tensor:  # (B,)
        """Blocks of rows of all directions at once: softmax, gradient of the logits, gradients of both sides."""
        matrices = list(self._matrices())
        columns = [len(matrix.right) for matrix in matrices]
        rows = self._rows_per_block(sum(columns) * (1 if self.problem.guide is None else 2))
        buffer = self._buffer(rows * sum(columns))
        normaliser = torch.empty_like(self.passes.positive)
        # a tensor core cuts digits off its sums, so that large cosines come out small; the loss is of the positives
        exact = self.similarity.paired(self.left, self.right[self.positives]) if self.passes.in_halves else None
        for start, stop in self._row_blocks(rows):
            tiles = [Tile(m.direction, start, stop, m.first, m.last) for m in matrices]
            block = buffer[: (stop - start) * sum(columns)].view(stop - start, -1)
            blocks = block.split(columns, dim=1)
            saved = [self._fill(m, t, b) for m, t, b in zip(matrices, tiles, blocks, strict=True)]
            if exact is not None:
                here = slice(start - self.part.first, stop - self.part.first)
                blocks[0].diagonal(start).copy_(exact[here])
            normaliser[start:stop], grads = self.passes.softmax_gradient(tiles, block, self.gradients)
            if self.gradients:
                for matrix, tile, grad, kept in zip(matrices, tiles, grads, saved, strict=True):
                    self._pull(matrix, tile, grad, kept)
        return normaliser[self.part.rows]

    def _statistics_first(self) -> Tensor:  # (B,)
        """Log-sum-exps of all rows and twin columns, then the same blocks again as gradients."""
        size, spec, part = self.problem.size, self.problem.spec, self.part
        like = self.passes.positive
        like.copy_(part.gathered(self.similarity.paired(self.left, self.right[self.positives])))
        normalisers = torch.full((spec.partitions, size), NEG_INF, dtype=like.dtype, device=like.device)
        by_row, by_twin = normalisers[0], normalisers[-1]
        for matrix in self._matrices():
            for tile, rows, twins in self._normalisers(matrix):
                by_row[tile.rows] = torch.logaddexp(by_row[tile.rows], rows)
                if twins is not None:
                    by_twin[tile.twin_rows] = torch.logaddexp(by_twin[tile.twin_rows], twins)
        if self._has("doc_to_query"):  # without it every row is here as a whole
            normalisers = part.merged(normalisers)
            by_row, by_twin = normalisers[0], normalisers[-1]
        if self.gradients:
            for matrix in self._matrices(gradients=True):
                for tile, block in self._blocks(matrix):
                    block, kept = self._again(matrix, tile, block)
                    self._pull(matrix, tile, self.passes.gradient(tile, block, by_row, by_twin), kept)
        return normalisers[:, part.rows].mean(dim=0)

    def _normalisers(self, matrix: Matrix) -> Iterator[tuple[Tile, Tensor, Tensor | None]]:
        if self.similarity.is_product and self.part.is_whole:
            tile = Tile(matrix.direction, 0, self.problem.size, 0, matrix.last, twins=(0, self.problem.size))
            left = self.similarity.left_operand(matrix.left)
            found = self.passes.fused_normalisers(tile, left, matrix.right)
            if found is not None:
                yield tile, *found
                return
        for tile, block in self._blocks(matrix):
            self._fill(matrix, tile, block)
            if self.keeps:
                self.filled[matrix.direction] = block.clone()
            yield tile, *self.passes.normalisers(tile, block)

    def _matrices(self, gradients: bool = False) -> Iterable[Matrix]:
        """The matrices of the objective; doc_to_query has none of its own, being the transpose of query_to_doc."""
        top = self.part.first
        yield Matrix("query_to_doc", self.left, self.right, self.d_left, self.d_right, top)
        if self._has("query_to_query"):
            first = 0 if self.gathers_queries else top
            yield Matrix("query_to_query", self.left, self.candidates, self.d_left, self.d_candidates, top, first)
        if self._has("doc_to_doc"):
            columns = slice(None) if self.problem.guide is None else slice(self.problem.size)
            d_left, d_right = (None if self.d_right is None else self.d_right[x] for x in (self.positives, columns))
            yield Matrix("doc_to_doc", self.right[self.positives], self.right[columns], d_left, d_right, top)

    def _blocks(self, matrix: Matrix) -> Iterator[tuple[Tile, Tensor]]:
        """The tiles of one matrix from top to bottom, each with room for its similarities."""
        size, direction = self.problem.size, matrix.direction
        has_twins = direction == "query_to_doc" and self._has("doc_to_query") and matrix.first < size
        twins = (matrix.first, min(matrix.last, size)) if has_twins else (0, 0)
        buffer = self.shared_buffer
        for start, stop in self._row_blocks(self._rows_per_block(self.passes.blocks_held * len(matrix.right))):
            if self.triangular and direction != "query_to_doc":
                tile = Tile(direction, start, stop, start, matrix.last, twins=(stop, size))
            else:
                tile = Tile(direction, start, stop, matrix.first, matrix.last, twins)
            yield tile, buffer[: (stop - start) * tile.width].view(stop - start, -1)

    def _row_blocks(self, rows: int) -> Iterator[tuple[int, int]]:
        for start in range(self.part.first, self.part.last, rows):
            yield start, min(start + rows, self.part.last)

    def _fill(self, matrix: Matrix, tile: Tile, block: Tensor) -> object:
        left, right = matrix.left[matrix.rows(tile)], matrix.right[matrix.columns(tile)]
        if matrix.direction == "doc_to_doc" and not self.similarity.symmetric:
            assert isinstance(self.similarity, RowwiseCallable)
            return self.similarity.fill_transposed(block, left, right)
        return self.similarity.fill(block, left, right)

    def _again(self, matrix: Matrix, tile: Tile, block: Tensor) -> tuple[Tensor, object]:
        """A tile's similarities for the second walk, and what `pull` needs beside their gradient (products: none)."""
        left_here = self.filled.pop(matrix.direction, None)
        return (block, self._fill(matrix, tile, block)) if left_here is None else (left_here, None)

    def _pull(self, matrix: Matrix, tile: Tile, grad: Tensor, kept: object) -> None:
        rows, columns = matrix.rows(tile), matrix.columns(tile)
        finishes = self.by_block and matrix.direction == "query_to_doc"
        d_left = self._zeros(tile.stop - tile.start) if finishes else None
        if matrix.d_left is not None:
            d_left = matrix.d_left[rows]
        d_right = matrix.d_right[columns] if matrix.d_right is not None else None
        self.similarity.pull(grad, matrix.left[rows], matrix.right[columns], kept, d_left, d_right)
        if finishes:
            assert d_left is not None
            self._finish_block(rows, d_left)

    def _finish_block(self, rows: slice, d_left: Tensor) -> None:
        """What is left to do with a block's gradient of the prepared queries when no other block adds to it."""
        left = self.left[rows]
        if self.needs.scale:
            self.left_products = self.left_products + sum_of_products(d_left, self.similarity.values(left))
        if self.d_queries is not None:
            saved = self.left_saved[rows] if self.left_saved is not None else None
            self.d_queries[rows] = self.similarity.finish(d_left, left, saved, self._factor)

    @functools.cached_property
    def keeps(self) -> bool:
        """Whether all matrices of products fit a block, so that they stay between the two walks and spare a GEMM."""
        columns = [len(matrix.right) for matrix in self._matrices()]
        held = sum(columns) + self.passes.blocks_held * max(columns)
        fit = fit_one_block(self.part.count, held, self.passes.dtype, self.queries.device)
        return self.gradients and self.similarity.is_product and fit

    def _rows_per_block(self, columns: int) -> int:
        return rows_per_block(self.part.count, columns, self.passes.dtype, self.queries.device)

    @functools.cached_property
    def shared_buffer(self) -> Tensor:
        """Room for a block of any matrix: one for all, because the last block of a matrix lives on into the next."""
        columns = [len(matrix.right) for matrix in self._matrices()]
        return self._buffer(max(self._rows_per_block(self.passes.blocks_held * count) * count for count in columns))

    def _buffer(self, entries: int) -> Tensor:
        return torch.empty(entries, dtype=self.passes.dtype, device=self.queries.device)

    def _share(self) -> float:
        """What a logit's gradient, as the passes give it, is of the loss' gradient."""
        unit = self.problem.size * self.problem.spec.partitions * self.passes.gradient_unit
        return self.part.processes / unit

    @functools.cached_property
    def _factor(self) -> Tensor:
        """What a prepared row's gradient is multiplied by: made once, and not for every block."""
        factor = self.problem.scale * self._share()
        if isinstance(factor, Tensor):
            return factor.to(self.passes.dtype)
        return torch.full((), factor, dtype=self.passes.dtype, device=self.queries.device)

    def _finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the rows as given and of the scale, from those of the prepared rows."""
        self._gather_back()
        d_scale = self._d_scale() * self._share() if self.needs.scale else None
        d_queries, d_docs = self.d_queries, None
        if self.needs.queries and self.d_left is not None:
            d_left = self.similarity.finish(self.d_left, self.left, self.left_saved, self._factor)
            d_queries = d_left.to(ready_dtype(self.queries.dtype))
        if self.needs.docs:
            assert self.d_right is not None
            d_right = self.similarity.finish(self.d_right, self.right, self.right_saved, self._factor)
            d_docs = d_right.to(ready_dtype(self.docs.dtype))
        return d_queries, d_docs, d_scale

    def _d_scale(self) -> Tensor:
        """The sum over all logits of gradient times similarity."""
        if isinstance(self.similarity, RowwiseCallable):
            return torch.as_tensor(self.similarity.scale_gradient)
        assert self.d_right is not None
        products = sum_of_products(self.d_right, self.similarity.values(self.right)) + self.left_products
        if self.d_left is not None:
            products = products + sum_of_products(self.d_left, self.similarity.values(self.left))
        return products / self.similarity.degree


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """The sum of all entries of `a * b`, without the product's memory."""
    return torch.dot(a.flatten(), b.to(a.dtype).flatten())
