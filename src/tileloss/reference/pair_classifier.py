"""A classifier over pairs as its definition reads: the concatenated features of a pair, and one linear layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairParts(NamedTuple):
    """Which features of a pair (u, v) there are, in their order: u and v, then |u - v|, then u * v."""

    rep: bool = True
    difference: bool = True
    multiplication: bool = False

    @property
    def vectors(self) -> int:
        """How many vectors of the embeddings' width the features of a pair consist of."""
        return 2 * self.rep + self.difference + self.multiplication


def pair_features(
    first: Tensor,  # (B, D)
    second: Tensor,  # (B, D)
    parts: PairParts,
) -> Tensor:  # (B, parts.vectors * D)
    """The features of each pair, concatenated."""
    features = [first, second] if parts.rep else []
    if parts.difference:
        features.append((first - second).abs())
    if parts.multiplication:
        features.append(first * second)
    return torch.cat(features, dim=1)


def pair_logits(
    first: Tensor,  # (B, D)
    second: Tensor,  # (B, D)
    weight: Tensor,  # (C, parts.vectors * D)
    bias: Tensor | None,  # (C,)
    parts: PairParts,
) -> Tensor:  # (B, C)
    """The logits of each pair, in the weight's dtype. Time O(B C D), memory two copies of the features."""
    return F.linear(pair_features(first, second, parts).to(weight.dtype), weight, bias)
