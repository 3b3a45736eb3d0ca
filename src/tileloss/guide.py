"""A guide: embeddings of another model that say which in-batch negatives are none (GISTEmbed)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tileloss.arguments import finite_number
from tileloss.errors import DeviceError, DtypeError, InputError, ShapeError

STRATEGIES = ("absolute", "relative")
# in units of the dtype's epsilon: products of unit rows that are equal in exact arithmetic come out this far apart
ROUNDING = 16.0


class Guide(NamedTuple):
    """Embeddings of the same texts by a model that is trusted, and how much like the positive a negative may be.

    A pair whose guide similarity (cosine) exceeds a query's threshold is no negative of it. What only rounding lifts
    above the threshold does not exceed it, so that copies of the positive count the same wherever they stand.

    Attributes:
        queries: (B, G) floating point, G being the guide's own width.
        docs: (M, G), row i of the same text as row i of the documents.
        margin: the threshold is the similarity of query and positive, less the margin; or
        strategy: with "relative" instead of "absolute", less the margin's share of that similarity.

    Source:
        Solatorio 2024 (arXiv 2402.16829); margins: de Souza et al. 2024 (2407.15831).
    """

    queries: Tensor
    docs: Tensor
    margin: float = 0.0
    strategy: str = "absolute"

    def check(self, queries: Tensor, docs: Tensor) -> None:
        """Refuse a guide that does not fit the embeddings, or settings that mean nothing."""
        if self.strategy not in STRATEGIES:
            raise InputError(f"margin_strategy must be 'absolute' or 'relative', got {self.strategy!r}.")
        finite_number(self.margin, "The margin of a guide must be a finite number")
        for name, own, guided in (("queries", queries, self.queries), ("docs", docs, self.docs)):
            if not isinstance(guided, Tensor):
                raise InputError(f"The guide's {name} must be a tensor, got {type(guided).__name__}.")
            if guided.ndim != 2 or len(guided) != len(own):
                raise ShapeError(
                    f"The guide's {name} have shape {tuple(guided.shape)}; they must be a matrix with one row for "
                    f"each of the {len(own)} {name}."
                )
            if not guided.is_floating_point():
                raise DtypeError(f"The guide's {name} must hold floating-point numbers, got {guided.dtype}.")
            if guided.device != own.device:
                raise DeviceError(f"The guide's {name} are on {guided.device}, the embeddings on {own.device}.")
        if self.queries.shape[1] != self.docs.shape[1]:
            raise ShapeError(
                f"The guide's queries have width {self.queries.shape[1]} and its docs {self.docs.shape[1]}; embed "
                "both by one guide."
            )


def thresholds(
    positive: Tensor,  # (B,): guide similarity of each query and its positive
    margin: float,
    strategy: str,
) -> Tensor:  # (B,)
    """The guide similarity above which a pair is no negative of the query."""
    less = margin if strategy == "absolute" else positive.abs() * margin
    return positive - less + ROUNDING * torch.finfo(positive.dtype).eps
