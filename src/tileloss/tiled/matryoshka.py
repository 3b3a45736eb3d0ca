"""The in-batch softmax loss at several prefix widths over row blocks: every width from the same product.

For a block of rows the widths come in ascending order. Each adds the product of its segment of columns to what stands
there, divides by the norms of its prefixes, and passes the cosines on as if they were alone: a `Passes` object a width
holds positives, hardest negatives and normalisers. The gradients of all widths are kept, a block each. A segment's
gradient is a product with the sum of the blocks of every width that reaches it, so one descending walk over the widths
multiplies every column once. In all: three GEMMs of the full width, or four with doc_to_query, where one call for each
width would take as many of each width; and K + 1 blocks instead of one.

Between the GEMMs a block is gone through some ten times for each width, in parts that stay in a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tileloss.similarity import full_precision, ready_dtype
from tileloss.tiled import Needs, Passes, Problem, Result, Tile, blocks
from tileloss.tiled.constants import constants
from tileloss.tiled.guide import GuideBlocks
from tileloss.tiled.matmul import accumulate, multiply
from tileloss.tiled.passes import NEG_INF
from tileloss.tiled.prefix_passes import PrefixPasses
from tileloss.tiled.prefixes import Prefixes, add_up_

# bytes of the part of a block that elementwise operations go through at a time: large enough that threads seldom wait
# for each other, and small enough for their cores' caches. On one core half of this and twice of it take the same time
_PART_BYTES = 2 << 20

# what is done with the cosines of one width: from (k, tiles, block) to the gradients of each tile's logits, if any
Visit = Callable[[int, Sequence[Tile], Tensor], Sequence[Tensor]]


@dataclass
class Matrix:
    """One direction's similarities, between two sets of rows."""

    direction: str
    left: Prefixes  # (B, D)
    right: Prefixes  # (C, D)

    @property
    def width(self) -> int:
        return self.right.inverse.shape[1]


def matryoshka_contrastive_loss(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (M, D): row i < B is the positive of query i
    problem: Problem,
    dims: Sequence[int],  # ascending
    weights: Sequence[float],
    needs: Needs,
    passes_class: type[Passes] = Passes,
    prefix_passes: PrefixPasses | None = None,
) -> Result:
    """The loss, its statistics (K, 3) and its gradients, as `tileloss.reference.matryoshka` defines them.

    Memory beside the inputs: a gradient for each side that needs one, K + 1 blocks of similarities of bounded size
    together, and a copy of inputs that are narrower than the sums, not contiguous, or for oneDNN to multiply; at the
    end, in place of the blocks, a copy of the gradient of `docs` where oneDNN has summed it.
    Time: three GEMMs of B x M x D, or four with doc_to_query.
    """
    with full_precision(queries):
        return _Walk(queries, docs, problem, dims, weights, needs, passes_class, prefix_passes or PrefixPasses()).run()


class _Walk:
    """One call: the rows under every width, a `Passes` for each, and the walks over the blocks."""

    def __init__(
        self,
        queries: Tensor,
        docs: Tensor,
        problem: Problem,
        dims: Sequence[int],
        weights: Sequence[float],
        needs: Needs,
        passes_class: type[Passes],
        prefix_passes: PrefixPasses,
    ) -> None:
        self.problem, self.needs, self.gradients = problem, needs, any(needs)
        self.prefix_passes = prefix_passes
        self.dtypes = ready_dtype(queries.dtype), ready_dtype(docs.dtype)
        # the guide belongs to no width: one set of its blocks serves the passes of all
        self.guided = _GuideOfBlock(problem.guide, problem.size) if problem.guide is not None else None
        self.passes = [passes_class(replace(problem, guide=None), queries, docs) for _ in dims]
        for passes in self.passes:
            passes.guided = self.guided
        self.dtype = self.passes[0].dtype
        self.weights = constants(weights, self.dtype, queries.device)
        # doc_to_query needs whole columns before any gradient, and its matrices are then walked one by one
        self.by_statistics = "doc_to_query" in problem.spec.directions
        # oneDNN multiplies no transposes: for the gradient of a right side every block would be transposed, once for
        # each segment, unless the sums are laid out by columns. Blocks must be dense for that, so of one matrix alone
        alone = self.by_statistics or len(problem.spec.directions) == 1
        self.queries = Prefixes.of(queries, dims, self.dtype, needs.queries)
        self.docs = Prefixes.of(docs, dims, self.dtype, needs.docs, by_columns=alone)
        self.d_scale = torch.zeros((), dtype=self.dtype, device=queries.device)
        self.groups = [[matrix] for matrix in self._matrices()] if self.by_statistics else [self._matrices()]
        # the products, the gradients of every width or one block of cosines, and what the guide says of the block
        self.blocks_held = 1 + (len(dims) if self.gradients else 1) + (problem.guide is not None)
        self.buffers = self._buffers()

    def run(self) -> Result:
        normaliser = self._statistics_first() if self.by_statistics else self._rows()
        loss = normaliser.mean(dim=1).dot(self.weights)
        positive = torch.stack([passes.positive for passes in self.passes])
        hardest = torch.stack([passes.hardest for passes in self.passes])
        stats = torch.stack([(positive > hardest).to(self.dtype), positive, hardest], dim=1).mean(dim=2).float()
        self.buffers.clear()  # room for what `finish` may copy
        # what a logit's gradient, as the passes give it, is of the loss'
        share = 1.0 / (self.problem.size * self.problem.spec.partitions)
        factor = self.passes[0].problem.scale * share
        d_queries = self.queries.finish(self.weights, factor, self.dtypes[0]) if self.needs.queries else None
        d_docs = self.docs.finish(self.weights, factor, self.dtypes[1]) if self.needs.docs else None
        return Result(loss, stats, d_queries, d_docs, self.d_scale * share if self.needs.scale else None)

    def _rows(self) -> Tensor:  # (K, B)
        """Blocks of rows of all directions at once: softmax and gradient of the logits."""
        normaliser = torch.empty_like(self.queries.inverse)

        def visit(k: int, tiles: Sequence[Tile], block: Tensor) -> Sequence[Tensor]:
            normaliser[k, tiles[0].rows], grads = self.passes[k].softmax_gradient(tiles, block, self.gradients)
            return grads

        self._walk(self.groups[0], visit, self.gradients)
        return normaliser

    def _statistics_first(self) -> Tensor:  # (K, B)
        """Log-sum-exps of all rows and twin columns, then the same blocks again as gradients."""
        size, partitions = self.problem.size, self.problem.spec.partitions
        for passes, cosines in zip(self.passes, _paired(self.queries, self.docs.head(size)), strict=True):
            passes.positive.copy_(cosines)
        normalisers = self.queries.inverse.new_full((partitions, len(self.passes), size), NEG_INF)
        by_row, by_twin = normalisers[0], normalisers[-1]

        def add(k: int, tile: Tile, rows: Tensor, twins: Tensor | None) -> None:
            by_row[k, tile.rows] = torch.logaddexp(by_row[k, tile.rows], rows)
            if twins is not None:
                by_twin[k, tile.twin_rows] = torch.logaddexp(by_twin[k, tile.twin_rows], twins)

        def collect(k: int, tiles: Sequence[Tile], block: Tensor) -> Sequence[Tensor]:
            add(k, tiles[0], *self.passes[k].normalisers(tiles[0], block))
            return ()

        def gradient(k: int, tiles: Sequence[Tile], block: Tensor) -> Sequence[Tensor]:
            return [self.passes[k].gradient(tiles[0], block, by_row[k], by_twin[k])]

        for matrices in self.groups:
            if not self._fused_normalisers(matrices[0], add):
                self._walk(matrices, collect, False)
        for matrices in self.groups if self.gradients else []:
            self._walk(matrices, gradient, True)
        return normalisers.mean(dim=0)

    def _fused_normalisers(self, matrix: Matrix, add: Callable[[int, Tile, Tensor, Tensor | None], None]) -> bool:
        """Normalisers from a GEMM's epilogue, which no two widths can share, where the backend's GEMM has one."""
        size = self.problem.size
        tile = Tile(matrix.direction, 0, size, 0, matrix.width, twins=(0, size))
        for k, passes in enumerate(self.passes):
            found = passes.fused_normalisers(tile, matrix.left.unit_rows(k), matrix.right.unit_rows(k))
            if found is None:
                return False
            add(k, tile, *found)
        return True

    def _matrices(self) -> list[Matrix]:
        """The matrices of the objective; doc_to_query has none of its own, being the transpose of query_to_doc."""
        positives = self.docs.head(self.problem.size)
        matrices = {
            "query_to_doc": Matrix("query_to_doc", self.queries, self.docs),
            "query_to_query": Matrix("query_to_query", self.queries, self.queries),
            "doc_to_doc": Matrix("doc_to_doc", positives, self.docs if self.guided is None else positives),
        }
        return [matrix for name, matrix in matrices.items() if name in self.problem.spec.directions]

    def _walk(self, matrices: Sequence[Matrix], visit: Visit, pulls: bool) -> None:
        """Visit the cosines of every width in every block of the matrices, and carry the gradients back."""
        for tiles in self._tiles(matrices):
            columns = [tile.width for tile in tiles]
            rows = tiles[0].stop - tiles[0].start
            products, *kept = (buffer[: rows * sum(columns)].view(rows, -1) for buffer in self.buffers)
            split = products.split(columns, dim=1)
            for k in range(len(self.passes)):
                for matrix, tile, product in zip(matrices, tiles, split, strict=True):
                    left, right = matrix.left.segments[k][tile.rows], matrix.right.segments[k][_columns(tile)]
                    accumulate(product, left, right.t()) if k else multiply(left, right.t(), out=product)
                block = kept[k if pulls else 0]
                for part, parts in self._parts(tiles):
                    for matrix, tile, product, out in zip(
                        matrices, parts, split, block[part].split(columns, dim=1), strict=True
                    ):
                        left, right = matrix.left.inverse[k, tile.rows], matrix.right.inverse[k, _columns(tile)]
                        self.prefix_passes.cosines(product[part], left, right, out)
                    grads = visit(k, parts, block[part])
                    if pulls:
                        for matrix, tile, product, grad in zip(matrices, parts, split, grads, strict=True):
                            self._weigh(k, matrix, tile, product[part], grad)
            if pulls:
                for place, (matrix, tile) in enumerate(zip(matrices, tiles, strict=True)):
                    self._pull(matrix, tile, [block.split(columns, dim=1)[place] for block in kept])
            if self.guided is not None:
                self.guided.forget()

    def _weigh(
        self,
        k: int,
        matrix: Matrix,
        tile: Tile,
        product: Tensor,  # (R, C) of the prefixes
        grad: Tensor,  # (R, C) of the logits; is divided by the norms of the right prefixes
    ) -> None:
        """What the norms of both sides answer for, while cosines and gradients are both at hand."""
        columns, left, right = _columns(tile), matrix.left, matrix.right
        by_row, by_column = self.prefix_passes.answers(
            grad, product, left.inverse[k, tile.rows], right.inverse[k, columns]
        )
        left.along[k, tile.rows] += by_row
        right.along[k, columns] += by_column
        if self.needs.scale:
            self.d_scale += by_row.sum() * self.weights[k]

    def _pull(
        self,
        matrix: Matrix,
        tile: Tile,
        grads: Sequence[Tensor],  # K times (R, C), divided by the norms of the right prefixes
    ) -> None:
        """Add to the gradients of both sides, segment by segment, from the sum over the widths that reach it."""
        columns, left, right = _columns(tile), matrix.left, matrix.right
        if left.gradient is None and right.gradient is None:
            return
        factors = left.inverse[:, tile.rows] * self.weights[:, None]
        total = grads[-1].mul_(factors[-1, :, None])
        for k in reversed(range(len(grads))):
            if k < len(grads) - 1:
                total.addcmul_(grads[k], factors[k, :, None])
            if left.gradient is not None:
                accumulate(left.gradient[tile.rows, left.columns[k]], total, right.segments[k][columns])
            if right.gradient is not None:
                accumulate(right.gradient[columns, left.columns[k]], total.t(), left.segments[k][tile.rows])

    def _tiles(self, matrices: Sequence[Matrix]) -> Iterator[list[Tile]]:
        """The same block of rows of every matrix, from top to bottom."""
        size = self.problem.size
        rows = self._rows_per_block(sum(matrix.width for matrix in matrices))
        for start in range(0, size, rows):
            stop = min(start + rows, size)
            yield [self._tile(matrix, start, stop) for matrix in matrices]

    def _tile(self, matrix: Matrix, start: int, stop: int) -> Tile:
        if not self.by_statistics:
            return Tile(matrix.direction, start, stop, 0, matrix.width)
        if matrix.direction == "query_to_doc":
            return Tile(matrix.direction, start, stop, 0, matrix.width, twins=(0, self.problem.size))
        # symmetric: the upper triangle, whose entries stand for their transposes too
        return Tile(matrix.direction, start, stop, start, matrix.width, twins=(stop, self.problem.size))

    def _parts(self, tiles: Sequence[Tile]) -> Iterator[tuple[slice, list[Tile]]]:
        """A block's rows a few at a time: where they stand in the block, and their tiles."""
        start, stop = tiles[0].start, tiles[0].stop
        rows = self._rows_per_part(sum(tile.width for tile in tiles))
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            yield slice(first - start, last - start), [replace(tile, start=first, stop=last) for tile in tiles]

    def _rows_per_block(self, columns: int) -> int:
        fitting = blocks.rows_per_block(self.problem.size, self.blocks_held * columns, self.dtype, self.weights.device)
        # a GEMM of fewer rows is slow, and so is one that adds them to a whole gradient
        rows = max(fitting, 4 * blocks.MIN_ROWS["cpu"])
        part = self._rows_per_part(columns)
        return min(rows // part * part if part < rows else rows, self.problem.size)

    def _rows_per_part(self, columns: int) -> int:
        """Of a block; on a GPU, where a pass is one kernel, a part is a whole block."""
        return max(_PART_BYTES // (columns * self.dtype.itemsize), 1) if self.weights.is_cpu else self.problem.size

    def _buffers(self) -> list[Tensor]:
        """The products and the blocks of every width, of the largest group's size."""
        widths = [sum(matrix.width for matrix in group) for group in self.groups]
        entries = max(self._rows_per_block(width) * width for width in widths)
        count = 1 + (len(self.passes) if self.gradients else 1)
        return [torch.empty(entries, dtype=self.dtype, device=self.weights.device) for _ in range(count)]


class _GuideOfBlock(GuideBlocks):
    """A guide whose answers for the tiles of a block are given again to every width."""

    def __init__(self, *settings: object) -> None:
        super().__init__(*settings)  # type: ignore[arg-type]
        self.known: dict[tuple[tuple[str, int], ...], Tensor] = {}

    def similarities(self, tiles: Sequence[Tile]) -> Tensor:
        return self._once(tiles, super().similarities)

    def excluded(self, tile: Tile) -> Tensor:
        return self._once([tile], lambda tiles: super(_GuideOfBlock, self).similarities(tiles) > self._limits(tile))

    def _limits(self, tile: Tile) -> Tensor:
        return self.thresholds[tile.rows, None]

    def _once(self, tiles: Sequence[Tile], answer: Callable[[Sequence[Tile]], Tensor]) -> Tensor:
        key = tuple((tile.direction, tile.start) for tile in tiles)
        if key not in self.known:
            self.known[key] = answer(tiles)
        return self.known[key]

    def forget(self) -> None:
        """The block is done with."""
        self.known.clear()


def _paired(a: Prefixes, b: Prefixes) -> Tensor:  # (K, N)
    """The cosines of each row with its counterpart at every width."""
    products = [torch.einsum("nd,nd->n", x, y) for x, y in zip(a.segments, b.segments, strict=True)]
    return add_up_(torch.stack(products)).mul_(a.inverse).mul_(b.inverse)


def _columns(tile: Tile) -> slice:
    return slice(tile.first, tile.last)
