"""What happens to a block of similarities between its GEMMs: masks, normalisers, and the gradient of the logits.

A block is R rows of one matrix of similarities. Logits are relative to the positive's logit of the row of the loss
that they belong to, and normalisers are the log-sum-exps of such logits: the loss is their mean, and no digits are
lost where the positives have won. `Passes` is the in-place PyTorch form of the three passes that the driver in
`contrastive.py` needs; `tileloss.kernels.passes` has the same three in Triton. Every pass leaves the driver a block
that the next GEMM can read, and none allocates more than a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tileloss.guide import Guide
from tileloss.spec import ContrastiveSpec
from tileloss.tiled.guide import GuideBlocks
from tileloss.tiled.rows import Rows
from tileloss.tiled.tile import Tile

NEG_INF = float("-inf")


@dataclass(frozen=True)
class Problem:
    """What every pass must know of the call beside the block: sizes, objective, exclusions.

    All are of the whole batch, but for the guide's queries: those are the ones from `first` on that are walked here.
    """

    size: int  # B, the number of queries
    docs: int  # M, the number of documents
    scale: float | Tensor
    spec: ContrastiveSpec
    doc_ids: Tensor | None = None  # (M,)
    mask: Tensor | None = None  # (B, M) boolean
    guide: Guide | None = None
    first: int = 0


class Passes(Rows):
    """The passes in PyTorch, in place; sums, maxima and gradients in float32, or float64 for float64 inputs."""

    gradient_unit = 1.0  # the passes return the logits' gradients times this
    blocks_held = 2  # at once, of a block with twins: both are exponentiated
    guide_rows: type[Rows] = Rows

    def __init__(self, problem: Problem, queries: Tensor, docs: Tensor) -> None:
        super().__init__(queries, docs)
        if isinstance(problem.scale, Tensor):  # a product with another number would otherwise be rounded to its dtype
            problem = replace(problem, scale=problem.scale.to(self.dtype))
        self.problem = problem
        # per row, raw similarities: of the positive (which the passes other than `softmax_gradient` are given), and of
        # the hardest negative
        self.positive = torch.empty(problem.size, dtype=self.dtype, device=queries.device)
        self.hardest = torch.full_like(self.positive, NEG_INF)
        guide = problem.guide
        self.guided = GuideBlocks(guide, problem.size, problem.first, self.guide_rows) if guide is not None else None

    def softmax_gradient(
        self,
        tiles: Sequence[Tile],  # the same rows of every direction
        block: Tensor,  # (R, sum of C): similarities, tile beside tile; is overwritten
        gradients: bool,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """One softmax over the rows of all tiles: its normaliser (R,), and the gradient of each tile's logits."""
        blocks = block.split([tile.width for tile in tiles], dim=1)
        first = self._positives(tiles[0], blocks[0])
        self.positive[tiles[0].rows] = first
        for tile, similarities in zip(tiles, blocks, strict=True):
            self._mask(tile, similarities)
            self._to_logits(tile, similarities)
        if not gradients:
            return _logsumexp_with_own_(block, 1, tiles[0].start, tiles[0].rows, first), ()
        peak = block.amax(dim=1)
        torch.softmax(block, dim=1, out=block)
        normaliser = peak - block.amax(dim=1).log_()  # the largest probability is 1 / (the sum of exp(logit - peak))
        first.sub_(1.0)
        return normaliser, blocks

    def normalisers(
        self,
        tile: Tile,
        block: Tensor,  # (R, C): similarities; is overwritten
    ) -> tuple[Tensor, Tensor | None]:
        """The normaliser of each row (R,), and of each twin column (T,) where the tile has twins."""
        self._mask(tile, block)
        twins = None
        if tile.has_twins:
            logits = self._twin_logits(tile, block)
            twins = _logsumexp_with_own_(logits, 0, tile.twins[0], *self._twin_own(tile, logits))
        self._to_logits(tile, block)
        if tile.direction != "query_to_doc":
            return logsumexp_(block, dim=1), twins
        return _logsumexp_with_own_(block, 1, tile.start, *next(self._own(tile, block))), twins

    def fused_normalisers(
        self,
        tile: Tile,  # a whole matrix of products; its first B columns are twins
        left: Tensor,  # (B, D): prepared rows
        right: Tensor,  # (C, D): prepared rows
    ) -> tuple[Tensor, Tensor] | None:
        """As `normalisers` for a whole matrix, storing no similarity; None where a GEMM has no epilogue, as here.

        Of a symmetric matrix only the entries right of the diagonal count: as their row's, and as their twin's.
        """
        return None

    def gradient(
        self,
        tile: Tile,
        block: Tensor,  # (R, C): similarities; is overwritten
        row_normaliser: Tensor,  # (B,)
        twin_normaliser: Tensor,  # (B,)
    ) -> Tensor:  # (R, C)
        """The gradient of the logits from known normalisers, times the number of partitions."""
        self._mask(tile, block)
        twins = self._twin_logits(tile, block) if tile.has_twins else None
        self._to_logits(tile, block)
        block.sub_(row_normaliser[tile.rows, None]).exp_()
        if twins is not None:
            block[:, tile.twin_columns] += twins.sub_(twin_normaliser[tile.twin_rows]).exp_()
        if tile.direction == "query_to_doc":
            self._positives(tile, block).sub_(float(self.problem.spec.partitions))
        return block

    def _to_logits(self, tile: Tile, block: Tensor) -> None:
        """Masked similarities to logits in place, and on the way the hardest negatives."""
        scale, spec = self.problem.scale, self.problem.spec
        positive = self.positive[tile.rows]
        if tile.direction != "query_to_doc":
            block.sub_(positive[:, None]).mul_(scale)
            return
        (rows, first), *others = self._own(tile, block)
        first.fill_(NEG_INF)
        # a row that comes in several blocks keeps the hardest of all
        self.hardest[tile.rows] = torch.maximum(self.hardest[tile.rows], block.amax(dim=1))
        hard_negatives = [similarities.clone() for _, similarities in others] if spec.weighs_hardness else []
        if spec.weighs_hardness and spec.hardness != "hard_negatives":
            block.mul_(scale + spec.hardness_strength).sub_((positive * scale)[:, None])
        else:
            block.sub_(positive[:, None]).mul_(scale)
        for (owners, column), similarities in zip(others, hard_negatives, strict=False):
            weighed = spec.hardness_strength if spec.hardness != "in_batch_negatives" else 0.0
            column.copy_(similarities * (scale + weighed) - self.positive[owners] * scale)
        first.copy_(self._own_logits(rows))

    def _own_logits(self, rows: slice) -> Tensor:
        """The positives' logits relative to themselves: zero, but nan where the similarity is no finite number."""
        return self.positive[rows] - self.positive[rows]

    def _twin_logits(self, tile: Tile, block: Tensor) -> Tensor:  # (R, T)
        """The logits of the twins in a block of masked similarities, each relative to the positive of its column."""
        logits = (block[:, tile.twin_columns] - self.positive[tile.twin_rows]).mul_(self.problem.scale)
        rows, own = self._twin_own(tile, logits)
        own.copy_(self._own_logits(rows))
        return logits

    def _twin_own(self, tile: Tile, logits: Tensor) -> tuple[slice, Tensor]:
        """As `_own`, in the logits of the twins; only in query_to_doc are any of them positives."""
        own = logits.diagonal(tile.start - tile.twins[0]) if tile.direction == "query_to_doc" else logits[0, :0]
        start = max(tile.start, tile.twins[0])
        return slice(start, start + len(own)), own

    def _positives(self, tile: Tile, block: Tensor) -> Tensor:
        """The diagonal of the rows' positives, or as much of it as lies in the block."""
        return next(self._own(tile, block))[1]

    def _own(self, tile: Tile, block: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The rows that meet themselves or a document of their own, and the diagonal of where they do.

        For one column of documents after the other; where a column lies beside the block, no rows.
        """
        size = self.problem.size
        columns = 1 if tile.direction == "query_to_query" else self.problem.docs // size
        for column in range(columns):
            shift = column * size
            start = max(tile.start, tile.first - shift)
            stop = max(min(tile.stop, tile.last - shift), start)
            top, left, count = start - tile.start, start + shift - tile.first, stop - start
            yield slice(start, stop), block[top : top + count, left : left + count].diagonal()

    def _mask(self, tile: Tile, block: Tensor) -> None:
        """Set what is no candidate to minus infinity: a row's own texts, and the excluded pairs."""
        excluded = self._excluded(tile, block)
        if excluded is not None:
            block.masked_fill_(excluded, NEG_INF)
        if tile.direction != "query_to_doc" and self.guided is None:
            for _, own in self._own(tile, block):
                own.fill_(NEG_INF)

    def _excluded(self, tile: Tile, block: Tensor) -> Tensor | None:
        """(R, C) boolean or None: pairs that the caller rules out; never a query's own positive."""
        ids, mask = self.problem.doc_ids, self.problem.mask
        excluded = self.guided.excluded(tile) if self.guided is not None else None
        if excluded is not None and tile.direction == "query_to_doc":
            self._positives(tile, excluded).fill_(False)
        if ids is not None:
            excluded = ids[tile.rows, None] == ids[None, tile.first : tile.last]
            for _, own in self._own(tile, excluded):
                own.fill_(False)
        if mask is not None and tile.direction == "query_to_doc":
            given = mask[tile.rows, tile.first : tile.last]
            excluded = given.clone() if excluded is None else excluded.logical_or_(given)
            self._positives(tile, excluded).fill_(False)
        return excluded


def logsumexp_(block: Tensor, dim: int) -> Tensor:
    """Log-sum-exp along `dim`, overwriting the block; minus infinity where every entry is."""
    peak = block.amax(dim=dim, keepdim=True)
    peak = torch.where(peak == NEG_INF, 0.0, peak)
    return block.sub_(peak).exp_().sum(dim=dim).log_().add_(peak.squeeze(dim))


def _logsumexp_with_own_(
    block: Tensor,  # (R, C)
    dim: int,
    start: int,  # row of the loss that the block begins with, across `dim`
    rows: slice,  # of the loss, that meet their positive in the block
    own: Tensor,  # where they do: a view of the block
) -> Tensor:
    """As `logsumexp_`, with the positives added last: of those that have won, the sum would keep nothing else."""
    positives = own.clone()
    own.fill_(NEG_INF)
    found = logsumexp_(block, dim)
    place = slice(rows.start - start, rows.stop - start)
    found[place] = torch.logaddexp(found[place], positives)
    return found
