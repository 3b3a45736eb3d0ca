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

INF = float("inf")
# a hinge counts as active above this, as sentence-transformers has it
ACTIVE = 1e-16
# its softplus is zero and so are the derivatives, which at minus infinity they are not
_NOTHING = -1e4


class Mined(NamedTuple):
    """The loss (0-dim) and, all 0-dim and detached, what it is the mean of."""

    loss: Tensor
    active: Tensor  # int64: terms that are above zero, with a soft margin all
    active_share: Tensor  # of the terms that there are; nan where there are none
    hardest_positive: Tensor  # mean distance of the anchors' farthest positives; nan where none has a positive
    hardest_negative: Tensor  # mean distance of the anchors' nearest negatives; nan where none has a negative


def triplet_loss(
    distances: Tensor,  # (B, B), B > 0
    labels: Tensor,  # (B,)
    mining: str,
    margin: float,  # 0 with a soft margin
    soft: bool,
) -> Mined:
    """The loss and its statistics, differentiable any number of times.

    Memory: several (B, B) matrices, and for "all" several of the number of pairs of anchor and positive times B.
    """
    same = labels[:, None] == labels
    positive = same ^ torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    t, terms = _MINING[mining](distances, same, positive, margin)
    active = terms if soft else (t > (ACTIVE if mining == "all" else 0.0)).sum()
    if soft:
        t = F.softplus(t.clamp_min(_NOTHING))
    elif mining == "semi_hard":
        t = torch.maximum(t, torch.zeros_like(t))  # with half a slope where both are equal
    else:
        t = t.clamp_min(0.0)  # with a slope of one there
    mean_over = active if mining == "all" else terms
    loss = t.sum() * (mean_over > 0) / mean_over.clamp_min(1)
    return Mined(loss, active, *_statistics(active, terms, distances.detach(), same, positive))


def _all(distances: Tensor, same: Tensor, positive: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    anchor, other = positive.nonzero(as_tuple=True)
    negatives = distances.masked_fill(same, INF)
    t = (distances[anchor, other][:, None] + margin) - negatives.index_select(0, anchor)
    return t, (~same).index_select(0, anchor).sum()


def _hard(distances: Tensor, same: Tensor, positive: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Anchors without a positive take zero for its distance, those without a negative the farthest row's."""
    farthest_positive = (distances * positive).max(dim=1).values
    farthest = distances.max(dim=1, keepdim=True).values
    nearest_negative = (distances + farthest * same).min(dim=1).values
    return farthest_positive - nearest_negative + margin, positive.new_tensor(len(positive), dtype=torch.int64)


def _semi_hard(distances: Tensor, same: Tensor, positive: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """In a batch without negatives their distance counts as zero."""
    negatives = distances.masked_fill(same, INF).sort(dim=1, stable=True).values
    place = torch.searchsorted(negatives.detach(), distances.detach().contiguous(), right=True)
    beyond = negatives.gather(1, place.clamp_max(len(same) - 1))
    farthest = distances.masked_fill(same, -INF).max(dim=1, keepdim=True).values
    negative = torch.where(beyond < INF, beyond, torch.where(farthest > -INF, farthest, 0.0))
    return torch.where(positive, distances - negative + margin, -INF), positive.sum()


_MINING = {"all": _all, "hard": _hard, "semi_hard": _semi_hard}


@torch.no_grad()
def _statistics(
    active: Tensor,
    terms: Tensor,
    distances: Tensor,  # (B, B)
    same: Tensor,  # (B, B)
    positive: Tensor,  # (B, B)
) -> tuple[Tensor, ...]:
    farthest_positive = distances.masked_fill(~positive, -INF).amax(dim=1)
    nearest_negative = distances.masked_fill(same, INF).amin(dim=1)
    return (active / terms).float(), mean_where_finite(farthest_positive), mean_where_finite(nearest_negative)


def mean_where_finite(
    x: Tensor,  # (B,)
) -> Tensor:
    """The mean (0-dim, float32) of the finite entries; nan where there are none."""
    return torch.where(x.isfinite(), x, float("nan")).nanmean().float()
