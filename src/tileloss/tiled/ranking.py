"""The ranking loss in O(B log B): sorted by label, the sum over pairs is one over rows of sums over a tail.

Few rows are compared pair by pair instead, which takes fewer operations. No matrix outlives the forward either way.

In the order of the labels, the rows above row k are a tail, which starts where the rows equal to it end; their sum
over exp(-score) comes from one scan that serves every k. The gradient of a row as the higher of a pair needs the sums
over heads of exp(score), one more scan. Everything is kept as a logarithm, so that no score is too large.

These are sorts and scans of B numbers, which PyTorch has for every device: there is nothing that a kernel of our own
would spare. The gradient comes with the loss, for it costs a scan that runs beside the other one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tileloss.backend import device_type
from tileloss.similarity import up

# rows that are compared pair by pair: measured on a CPU, and on GPUs a guess on the safe side
FEW_ROWS = {"cpu": 112, "cuda": 308}


def ranking_loss(
    scores: Tensor,  # (B,), B > 0
    labels: Tensor,  # (B,) without nan
) -> tuple[Tensor, Tensor]:
    """The loss, 0-dim, and its gradient (B,), in the dtype of the sums: float32, or float64 for float64 scores."""
    few = FEW_ROWS.get(device_type(scores), FEW_ROWS["cuda"])
    return _pair_by_pair(scores, labels) if len(scores) <= few else _sorted(scores, labels)


def _pair_by_pair(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    scores = up(scores)
    excess = scores[:, None] - scores
    excess.masked_fill_(labels[:, None] >= labels, float("-inf"))
    loss = torch.cat([scores.new_zeros(1), excess.flatten()]).logsumexp(dim=0)
    shares = excess.sub_(loss).exp_()
    return loss, shares.sum(dim=1).sub_(shares.sum(dim=0))


def _sorted(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    labels, order = labels.sort()
    scores = up(scores)[order]
    # as two rows of one matrix, because on CUDA the scan of a vector is not repeatable to the last bit
    scans = torch.stack([scores.neg().flip(0), scores]).logcumsumexp(dim=1)
    nothing = scores.new_full((1,), float("-inf"))
    tails = torch.cat([scans[0].flip(0), nothing])  # tails[j]: over the rows from j on
    heads = torch.cat([nothing, scans[1]])  # heads[j]: over the rows before j

    above, below = torch.searchsorted(labels, labels, right=True), torch.searchsorted(labels, labels)
    # without a partner there is no term, whatever the score
    as_lower = (scores + tails[above]).masked_fill_(above == len(labels), float("-inf"))
    as_higher = (heads[below] - scores).masked_fill_(below == 0, float("-inf"))
    loss = torch.cat([scores.new_zeros(1), as_lower]).logsumexp(dim=0)
    slopes = (as_lower - loss).exp_() - (as_higher - loss).exp_()
    return loss, torch.empty_like(slopes).scatter_(0, order, slopes)
