"""The masks of valid pairs and triplets, with nothing beside them: what is computed is written where it stays.

Two rows of one label and a third of another are three rows, so a triplet is valid where both its pairs are, and no
third condition has to be formed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def triplet_masks(
    labels: Tensor,  # (B,)
    triplets: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # (B, B), (B, B), (B, B, B) booleans
    """As `tileloss.reference.triplet_masks`, in one write of each mask."""
    positive = labels[:, None] == labels
    negative = positive.logical_not()
    positive.fill_diagonal_(False)
    triplet = torch.logical_and(positive[:, :, None], negative[:, None, :]) if triplets else None
    return positive, negative, triplet
