"""The passes of the in-batch softmax loss in Triton, for the driver in `tileloss.tiled.contrastive`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tileloss.kernels import halves, known_normalisers, normalisers, softmax_rows
from tileloss.kernels.logits import Objective
from tileloss.kernels.rows import GuideRows, TritonRows
from tileloss.tiled.passes import Passes, Problem
from tileloss.tiled.tile import Tile

_COSINES = ("cosine", "torch_cosine")
_PRODUCTS = (*_COSINES, "dot")


class TritonPasses(TritonRows, Passes):
    """One kernel a pass; sums, maxima and similarities in float32 whatever the operands.

    The GEMMs around the passes read operands of the inputs' own dtype: bfloat16 and float16 rows, and gradients of
    their logits, go to the tensor cores as they are, and large float32 cosines in halves. Distances are computed from
    float32 rows, and so are inputs of two dtypes. Gradients that are to be float16 are held times 2^14, because a
    softmax over many negatives is smaller than float16 goes.
    """

    blocks_held = 1
    guide_rows = GuideRows

    def __init__(self, problem: Problem, queries: Tensor, docs: Tensor) -> None:
        super().__init__(problem, queries, docs)
        if queries.dtype == docs.dtype and problem.spec.similarity in _PRODUCTS:
            self.operand_dtype = queries.dtype
        exact_cosines = self.operand_dtype == torch.float32 and problem.spec.similarity in _COSINES
        self.in_halves = exact_cosines and halves.pays(len(queries), len(docs), queries.shape[1], queries.device)
        self.gradient_unit = 2.0**14 if self.in_halves or self.operand_dtype == torch.float16 else 1.0
        self.objective = Objective.of(problem, queries.device)

    def softmax_gradient(
        self, tiles: Sequence[Tile], block: Tensor, gradients: bool
    ) -> tuple[Tensor, Sequence[Tensor]]:
        gradient = softmax_rows.gradient_memory(block, self.operand_dtype) if gradients else None
        rows = tiles[0].stop - tiles[0].start
        normaliser = torch.empty(rows, dtype=self.dtype, device=block.device)
        guide = self.guided.similarities(tiles) if self.guided is not None else None
        softmax_rows.softmax_rows(
            tiles, block, self.objective, normaliser, self.positive, self.hardest, gradient, self.gradient_unit,
            guide, self.guided.thresholds if self.guided is not None else None,
        )  # fmt: skip
        return normaliser, () if gradient is None else gradient.split([tile.width for tile in tiles], dim=1)

    def fused_normalisers(self, tile: Tile, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return normalisers.fused_normalisers(tile, left, right, self.objective, self.positive, self.hardest)

    def gradient(self, tile: Tile, block: Tensor, row_normaliser: Tensor, twin_normaliser: Tensor) -> Tensor:
        gradient = softmax_rows.gradient_memory(block, self.operand_dtype)
        known_normalisers.gradient_from_normalisers(
            tile, block, self.objective, row_normaliser, twin_normaliser, self.positive, gradient,
            self.problem.spec.partitions, self.gradient_unit,
        )  # fmt: skip
        return gradient
