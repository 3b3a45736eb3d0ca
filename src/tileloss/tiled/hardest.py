"""The hardest negative of each query over row blocks: one GEMM forward, and a backward that touches two pairs a row.

A block of rows is filled with similarities, reduced to its maxima and overwritten by the next; nothing of it is kept.
The backward knows from the indices which two products of a row have a gradient, its own document's and the hardest
negative's, and reaches their rows alone: O(B D), no GEMM. What differs between devices is the pass over a block and
the way back through the pairs, the business of a `HardestPasses` object, in PyTorch here and in Triton in
`tileloss.kernels.hardest`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tileloss.similarity import full_precision
from tileloss.tiled.block_similarity import block_similarity
from tileloss.tiled.blocks import rows_per_block
from tileloss.tiled.chosen_pairs import pull_pairs
from tileloss.tiled.rows import Rows


class HardestPasses(Rows):
    """The passes in PyTorch."""

    def row_maxima(
        self,
        block: Tensor,  # (R, M): similarities of the queries from `start`; is overwritten
        start: int,
        hardest: Tensor,  # (R,): is written
        index: Tensor,  # (R,) int64: is written
        own: Tensor,  # (R,): is written
    ) -> None:
        """The largest similarity of each row with another document than its own, and the first place of it."""
        diagonal = block.diagonal(start)
        own.copy_(diagonal)
        diagonal.fill_(float("-inf"))
        torch.max(block, dim=1, out=(hardest, index))
        index.masked_fill_(hardest == float("-inf"), -1)

    def pull_pairs(
        self,
        weights: Tensor,  # (B, 2)
        partners: Tensor,  # (B, 2) int64
        left: Tensor,  # (B, D)
        right: Tensor,  # (M, D)
        d_left: Tensor | None,  # (B, D): is added to
        d_right: Tensor | None,  # (M, D): is added to
    ) -> None:
        """As `tileloss.tiled.chosen_pairs.pull_pairs`."""
        pull_pairs(weights, partners, left, right, d_left, d_right)


def hardest_negatives(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (M, D): row i < B belongs to query i
    similarity: str,  # one whose entries are products of prepared rows
    passes_class: type[HardestPasses] = HardestPasses,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hardest similarity (B,), its index (B,) and own similarity (B,), as `tileloss.reference.hardest` defines them.

    Memory beside the inputs: the prepared documents, and one block of similarities of bounded size.
    """
    passes = passes_class(queries, docs)
    measure = block_similarity(similarity, passes)
    size, count = len(queries), len(docs)
    hardest = torch.empty(size, dtype=passes.dtype, device=queries.device)
    own, index = torch.empty_like(hardest), torch.empty_like(hardest, dtype=torch.int64)
    with full_precision(queries):
        right, _ = measure.prepare(docs)
        step = rows_per_block(size, count, passes.dtype, queries.device)
        buffer = torch.empty(step, count, dtype=passes.dtype, device=queries.device)
        for start in range(0, size, step):
            rows = slice(start, min(start + step, size))
            left, _ = measure.prepare(queries[rows])
            block = buffer[: len(left)]
            measure.fill(block, left, right)
            passes.row_maxima(block, start, hardest[rows], index[rows], own[rows])
    return hardest, index, own


def hardest_negatives_backward(
    d_hardest: Tensor,  # (B,)
    d_own: Tensor,  # (B,)
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (M, D)
    index: Tensor,  # (B,) int64: -1 where there is no pair
    similarity: str,
    needs: Sequence[bool],  # whether queries and docs want a gradient
    passes_class: type[HardestPasses] = HardestPasses,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of queries and docs, through the chosen pairs alone.

    Memory beside inputs and gradients: the prepared rows of both sides.
    """
    passes = passes_class(queries, docs)
    measure = block_similarity(similarity, passes)
    own = torch.arange(len(queries), device=index.device)
    weights = torch.stack([d_own, d_hardest.masked_fill(index < 0, 0.0)], dim=1).to(passes.dtype)
    partners = torch.stack([own, index.clamp_min(0)], dim=1)
    d_queries, d_docs = (
        torch.zeros(x.shape, dtype=passes.dtype, device=x.device) if need else None
        for x, need in zip((queries, docs), needs, strict=True)
    )
    with full_precision(queries):
        left, left_saved = measure.prepare(queries)
        right, right_saved = measure.prepare(docs)
        passes.pull_pairs(weights, partners, left, right, d_queries, d_docs)
        if d_queries is not None:
            d_queries = measure.finish(d_queries, left, left_saved, 1.0).to(queries.dtype)
        if d_docs is not None:
            d_docs = measure.finish(d_docs, right, right_saved, 1.0).to(docs.dtype)
    return d_queries, d_docs
