"""Which pairs and triplets of a labelled batch are valid: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def triplet_masks(
    labels: Tensor,  # (B,)
    triplets: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # (B, B), (B, B), (B, B, B) booleans
    """Anchor and positive: one label, two rows. Anchor and negative: two labels. Triplets: both, of three rows."""
    same = labels[:, None] == labels
    distinct = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    triplet = None
    if triplets:
        three_rows = distinct[:, :, None] & distinct[:, None, :] & distinct
        triplet = same[:, :, None] & ~same[:, None, :] & three_rows
    return same & distinct, ~same, triplet
