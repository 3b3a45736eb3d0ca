"""The guide's similarities, in the same blocks as the model's, and which pairs they rule out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tileloss.guide import Guide, thresholds
from tileloss.tiled.rows import Rows
from tileloss.tiled.similarity import TorchCosine
from tileloss.tiled.tile import Tile


class GuideBlocks:
    """The unit rows of a guide and a threshold for each query; a block of its similarities costs one GEMM.

    Attributes:
        thresholds: (B,) the guide similarity above which a pair is no negative of the query.
    """

    def __init__(self, guide: Guide, size: int, rows_class: type[Rows] = Rows) -> None:
        cosine = TorchCosine(rows_class(guide.queries, guide.docs))
        self.cosine, self.dtype = cosine, cosine.rows.dtype
        self.queries, _ = cosine.prepare(guide.queries)
        self.docs, _ = cosine.prepare(guide.docs)
        positive = cosine.paired(self.queries, self.docs[:size])
        self.thresholds = thresholds(positive, guide.margin, guide.strategy)

    def similarities(
        self,
        tiles: Sequence[Tile],  # the same rows of several directions
    ) -> Tensor:  # (R, sum of C)
        """The guide's block for each tile, side by side."""
        widths = [tile.width for tile in tiles]
        block = torch.empty(tiles[0].stop - tiles[0].start, sum(widths), dtype=self.dtype, device=self.docs.device)
        for tile, out in zip(tiles, block.split(widths, dim=1), strict=True):
            left = self.docs if tile.direction == "doc_to_doc" else self.queries
            right = self.queries if tile.direction == "query_to_query" else self.docs
            self.cosine.fill(out, left[tile.rows], right[tile.first : tile.last])
        return block

    def excluded(self, tile: Tile) -> Tensor:  # (R, C) boolean
        """Whether the guide takes a pair for too alike to be a negative."""
        return self.similarities([tile]) > self.thresholds[tile.rows, None]
