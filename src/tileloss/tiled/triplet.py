"""Triplet losses over row blocks: distances that are never stored whole, gradients ready when the forward returns.

The rows are prepared once. Of each block of anchors the products with all rows are one GEMM; a pass mines triplets
from it and turns it into the slopes of the products, which two GEMMs carry back to the rows (an anchor is also
everyone's positive or negative, so both sides are the same gradient). The hardest triplets have two slopes a row, and
semi-hard ones two for each positive: where that is few, they are collected, and go back through those pairs alone.

The walk is the same on every device. What happens to a block is the business of a `Mining` object, in PyTorch
(`tiled/mining.py`) or in Triton (`tileloss.kernels.mining`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tileloss.similarity import full_precision, ready_dtype
from tileloss.tiled.blocks import rows_per_block
from tileloss.tiled.distance import PreparedRows
from tileloss.tiled.mining import Classes, Mining, MiningProblem


class Mined(NamedTuple):
    """As `tileloss.reference.triplet.Mined`, and the gradient of the embeddings, None where none was asked for."""

    loss: Tensor
    active: Tensor
    hardest_positive: Tensor
    hardest_negative: Tensor
    d_embeddings: Tensor | None


def triplet_loss(
    embeddings: Tensor,  # (B, D), B > 0
    labels: Tensor,  # (B,)
    mining: str,
    margin: float,
    soft: bool,
    distance: str,
    gradients: bool,
    mining_class: type[Mining] = Mining,
) -> Mined:
    """The loss, what its statistics are made of, and its gradient, as `tileloss.reference.triplet` defines them.

    Memory beside the inputs: the prepared rows, a gradient, and one block of distances with parts of it. Time: three
    GEMMs of B x B x D; one, and O(B D) for "hard", or O(B D P) for "semi_hard" where an anchor has few positives. The
    comparisons take O(B^2 log P) for P positives of an anchor at most.
    """
    problem = MiningProblem(len(labels), Classes.from_labels(labels), distance, margin, soft)
    miner = mining_class(problem, embeddings)
    with full_precision(embeddings):
        prepared = miner.distance.prepare(embeddings)
        walk = _hard if mining == "hard" else _of_terms
        d_rows, terms = walk(miner, prepared, mining, gradients)
        active = miner.active.sum()
        divisor = active if mining == "all" else terms
        factor = torch.where(divisor > 0, 1.0 / divisor.to(miner.dtype), 0.0)
        loss = miner.total.sum() * factor
        if d_rows is not None:
            unit = 1.0 if mining == "hard" else miner.gradient_unit
            d_rows = miner.distance.finish(d_rows, prepared, factor / unit).to(ready_dtype(embeddings.dtype))
    return Mined(loss, active, miner.hardest_positive, miner.hardest_negative, d_rows)


def _of_terms(miner: Mining, prepared: PreparedRows, mining: str, gradients: bool) -> tuple[Tensor | None, Tensor]:
    """The gradient of the prepared rows for a sum over the terms, and their number; slopes everywhere, or at pairs."""
    rows, _, squares = prepared
    d_rows = torch.zeros(rows.shape, dtype=miner.dtype, device=rows.device) if gradients else None
    # of each row's slopes on either side: carried back once, since every block would go through the whole gradient
    sums = None if squares is None else torch.zeros_like(squares)
    mine = miner.all_triplets if mining == "all" else miner.semi_hard
    for start, block in _blocks(miner, rows):
        here = slice(start, start + len(block))
        miner.distance.products(rows[here], rows, block)
        slopes = mine(start, block, None if squares is None else squares[here], squares, gradients)
        if slopes is not None and d_rows is not None:
            miner.distance.product.pull(slopes, rows[here], rows, None, d_rows[here], d_rows)
            if sums is not None:
                sums[here] += slopes.sum(dim=1, dtype=sums.dtype)
                sums += slopes.sum(dim=0, dtype=sums.dtype)
    if miner.pairs is not None and d_rows is not None:
        miner.pull_pairs(*miner.pairs, rows, rows, d_rows, d_rows, norms=sums is not None)
    elif sums is not None and d_rows is not None:
        miner.distance.pull_norms(sums, rows, d_rows)
    count = miner.problem.classes.count
    terms = (count - 1) * (miner.problem.size - count) if mining == "all" else count - 1
    return d_rows, terms.sum()


def _hard(miner: Mining, prepared: PreparedRows, mining: str, gradients: bool) -> tuple[Tensor | None, Tensor]:
    """As `_of_terms`, with slopes at two pairs an anchor."""
    rows, _, squares = prepared
    for start, block in _blocks(miner, rows):
        here = slice(start, start + len(block))
        miner.distance.products(rows[here], rows, block)
        miner.hard(start, block, None if squares is None else squares[here], squares)
    problem = miner.problem
    positive = miner.hardest_positive.clamp_min(0.0)
    t = positive - miner.negative + problem.margin
    miner.total = F.softplus(t) if problem.soft else t.clamp_min(0.0)
    miner.active = torch.ones_like(miner.active) if problem.soft else (miner.total != 0).long()
    terms = torch.full_like(miner.active, problem.size)[0]
    if not gradients:
        return None, terms
    weight = t.sigmoid() if problem.soft else (t >= 0).to(t.dtype)
    own = torch.arange(problem.size, device=t.device)
    partners = torch.stack([miner.positive_index, miner.negative_index], dim=1)
    weights = torch.stack([weight, weight.neg()], dim=1) * (partners != own[:, None])
    slopes = miner.distance.slopes_(weights, torch.stack([positive, miner.negative], dim=1))
    d_rows = torch.zeros(rows.shape, dtype=miner.dtype, device=rows.device)
    miner.pull_pairs(slopes, partners, rows, rows, d_rows, d_rows, norms=squares is not None)
    return d_rows, terms


def _blocks(miner: Mining, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The first row of each block of anchors, and room for its products."""
    size = len(rows)
    step = rows_per_block(size, size * miner.blocks_held, miner.dtype, rows.device)
    buffer = torch.empty(step, size, dtype=miner.dtype, device=rows.device)
    for start in range(0, size, step):
        yield start, buffer[: min(step, size - start)]
