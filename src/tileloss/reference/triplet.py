"""Triplet losses over a batch as their definitions read: the matrix of distances, masks, gradients by autograd.

Every row is an anchor; other rows of its class are its positives, rows of other classes its negatives. The loss of a
triplet is max(t, 0) with t = d(anchor, positive) - d(anchor, negative) + margin, or softplus(t) with a soft margin and
no other. Which triplets count is the mining:

* all: every triplet, averaged over those with a loss above zero; over all of them with a soft margin;
* hard: of each anchor the farthest positive and the nearest negative, averaged over the anchors;
* semi_hard: every pair of anchor and positive, with the nearest negative that is farther away than the positive, or
  failing that the farthest negative, averaged over the pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tileloss.metrics import ROUNDING
from tileloss.similarity import up

INF = float("inf")
# a hinge counts as active above this, as sentence-transformers has it
ACTIVE = 1e-16
# its softplus is zero and so are the derivatives, which at minus infinity they are not
_NOTHING = -1e4


class Mined(NamedTuple):
    """The loss (0-dim) and, all detached, what statistics are made of when somebody asks for them."""

    loss: Tensor
    active: Tensor  # 0-dim int64: terms that are above zero, with a soft margin all
    hardest_positive: Tensor  # (B,): distance of each anchor's farthest positive; anything where it has none
    hardest_negative: Tensor  # (B,): distance of each anchor's nearest negative; anything where it has none


def triplet_loss(
    distances: Tensor,  # (B, B), B > 0
    labels: Tensor,  # (B,)
    mining: str,
    margin: float,  # 0 with a soft margin
    soft: bool,
) -> Mined:
    """The loss, differentiable any number of times, and what its statistics are made of.

    Memory: several (B, B) matrices, and for "all" several of the number of pairs of anchor and positive times B.
    """
    same = labels[:, None] == labels
    t, terms, farthest_positive, nearest_negative = _MINING[mining](distances, same, margin)
    if soft:
        active = terms if isinstance(terms, Tensor) else torch.full((), terms, device=labels.device)
        t = F.softplus(t.clamp_min(_NOTHING))
    elif mining == "semi_hard":
        t = torch.maximum(t, t.new_zeros(()))  # with half a slope where both are equal
        active = t.count_nonzero()
    else:
        t = t.masked_fill(t < 0.0, 0.0)  # with a slope of one at zero, where that of `clamp` is torch's to choose
        active = (t > ACTIVE).sum() if mining == "all" else t.count_nonzero()
    if mining == "hard":
        loss = t.mean()
    elif mining == "semi_hard":
        loss = t.sum() / torch.as_tensor(terms).clamp_min(1)
    else:
        loss = t.sum() * (active > 0) / active.clamp_min(1)
    return Mined(loss, active, farthest_positive.detach(), nearest_negative.detach())


# the difference in every term; how many terms there are; farthest positive and nearest negative of each anchor
_Terms = tuple[Tensor, Tensor | int, Tensor, Tensor]


def euclidean_distances(
    x: Tensor,  # (B, D)
) -> Tensor:  # (B, B)
    """As `tileloss.reference.pairwise` has the distances within one set of rows, in fewer operations."""
    x = up(x)
    products = x @ x.T
    squares = products.diagonal()
    distances = torch.add(squares, products, alpha=-2.0) + squares[:, None]
    rounding = (squares.detach() * (2 * ROUNDING * torch.finfo(x.dtype).eps)).nan_to_num_(0.0, 0.0)
    nearly_equal = distances.detach() <= rounding[:, None]
    nearly_equal.diagonal().fill_(True)  # fill_diagonal_ would bind a compiled graph to one batch size
    return distances.masked_fill(nearly_equal, INF).sqrt().masked_fill(nearly_equal, 0.0)


def _all(distances: Tensor, same: Tensor, margin: float) -> _Terms:
    positive = _without_self(same.clone())
    anchor, other = positive.nonzero(as_tuple=True)
    negatives = distances.masked_fill(same, INF)
    t = (distances[anchor, other][:, None] + margin) - negatives.index_select(0, anchor)
    terms = (len(same) - same.sum(dim=1)).index_select(0, anchor).sum()
    return t, terms, (distances.detach() * positive).amax(dim=1), negatives.detach().amin(dim=1)


def _hard(distances: Tensor, same: Tensor, margin: float) -> _Terms:
    """Anchors without a positive take zero for its distance, those without a negative the farthest row's."""
    positive = _without_self(same.to(distances.dtype))
    farthest_positive = (distances * positive).max(dim=1).values
    farthest = distances.max(dim=1, keepdim=True).values
    nearest_negative = torch.addcmul(distances, farthest, same.to(distances.dtype)).min(dim=1).values
    t = farthest_positive - nearest_negative + margin
    return t, len(same), farthest_positive, nearest_negative


def _semi_hard(distances: Tensor, same: Tensor, margin: float) -> _Terms:
    """In a batch without negatives their distance counts as zero."""
    positive = _without_self(same.clone())
    negatives = distances.masked_fill(same, INF).sort(dim=1, stable=True).values
    place = torch.searchsorted(negatives.detach(), distances.detach().contiguous(), right=True)
    beyond = negatives.gather(1, place.clamp_max_(len(same) - 1))
    farthest = distances.masked_fill(same, -INF).max(dim=1, keepdim=True).values
    farthest = torch.where(farthest > -INF, farthest, 0.0)
    t = distances - torch.where(beyond < INF, beyond, farthest) + margin
    farthest_positive = (distances.detach() * positive).amax(dim=1)
    return torch.where(positive, t, -INF), positive.sum(), farthest_positive, negatives[:, 0]


_MINING = {"all": _all, "hard": _hard, "semi_hard": _semi_hard}


def _without_self(same: Tensor) -> Tensor:  # (B, B)
    """Zeroes the diagonal, in place."""
    same.diagonal().zero_()  # not fill_diagonal_, as above
    return same
