"""The ranking loss as its definition reads: one term for each two rows whose labels differ. Gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from tileloss.similarity import up


def ranking_loss(
    scores: Tensor,  # (B,)
    labels: Tensor,  # (B,)
) -> Tensor:
    """log(1 + sum of exp(scores[k] - scores[i]) over all k, i with labels[k] < labels[i]), 0-dim.

    Time O(B^2), memory three (B, B) matrices with their gradients.
    """
    scores = up(scores)
    excess = scores[:, None] - scores
    counts = labels[:, None] < labels
    terms = excess.masked_fill(~counts, float("-inf")).flatten()
    return torch.cat([scores.new_zeros(1), terms]).logsumexp(dim=0)
