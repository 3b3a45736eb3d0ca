"""The guide's similarities, in the same blocks as the model's, and which pairs they rule out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tileloss.guide import Guide, thresholds
from tileloss.tiled.block_similarity import block_similarity
from tileloss.tiled.rows import Rows
from tileloss.tiled.tile import Tile


class GuideBlocks:
    """The unit rows of a guide and a threshold for each query; a block of its similarities costs one GEMM.

    Attributes:
        thresholds: (B,) the guide similarity above which a pair is no negative of the query; minus infinity for
            queries that are not walked here.
    """

    def __init__(
        self,
        guide: Guide,  # of the queries from `first` on, and all documents
        size: int,
        first: int = 0,
        rows_class: type[Rows] = Rows,
    ) -> None:
        cosine = block_similarity("torch_cosine", rows_class(guide.queries, guide.docs))
        self.cosine, self.dtype = cosine, cosine.rows.dtype
        self.queries, _ = cosine.prepare(guide.queries)
        self.docs, _ = cosine.prepare(guide.docs)
        self.first = first
        rows = slice(first, first + len(self.queries))
        positive = cosine.paired(self.queries, self.docs[rows])
        self.thresholds = positive.new_full((size,), float("-inf"))
        self.thresholds[rows] = thresholds(positive, guide.margin, guide.strategy)

    def similarities(
        self,
        tiles: Sequence[Tile],  # the same rows of several directions
    ) -> Tensor:  # (R, sum of C)
        """The guide's block for each tile, side by side."""
        widths = [tile.width for tile in tiles]
        block = torch.empty(tiles[0].stop - tiles[0].start, sum(widths), dtype=self.dtype, device=self.docs.device)
        for tile, out in zip(tiles, block.split(widths, dim=1), strict=True):
            left, top = (self.docs, 0) if tile.direction == "doc_to_doc" else (self.queries, self.first)
            right, first = (self.queries, self.first) if tile.direction == "query_to_query" else (self.docs, 0)
            self.cosine.fill(
                out, left[tile.start - top : tile.stop - top], right[tile.first - first : tile.last - first]
            )
        return block

    def excluded(self, tile: Tile) -> Tensor:  # (R, C) boolean
        """Whether the guide takes a pair for too alike to be a negative."""
        return self.similarities([tile]) > self.thresholds[tile.rows, None]
