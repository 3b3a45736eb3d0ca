"""An anchor should be nearer to its positive than to its negative, by a margin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tileloss.functional import paired_distance
from tileloss.functional.pairs import paired_columns
from tileloss.losses import citations
from tileloss.losses.columns import embed_columns, expect_columns
from tileloss.losses.distance_metrics import DistanceFn, metric_name, stock_name

_COLUMNS = ("anchor", "positive", "negative")


def _cosine(
    x: Tensor,  # (B, D)
    y: Tensor,  # (B, D)
) -> Tensor:  # (B,)
    """1 - cosine similarity of each row of `x` with that of `y`."""
    return paired_distance(x, y, metric="cosine")


def _euclidean(
    x: Tensor,  # (B, D)
    y: Tensor,  # (B, D)
) -> Tensor:  # (B,)
    """Euclidean distance of each row of `x` to that of `y`; a distance of zero has gradient zero."""
    return paired_distance(x, y, metric="euclidean")


def _manhattan(
    x: Tensor,  # (B, D)
    y: Tensor,  # (B, D)
) -> Tensor:  # (B,)
    """Manhattan distance of each row of `x` to that of `y`."""
    return paired_distance(x, y, metric="manhattan")


class TripletDistanceMetric(Enum):
    """Distances of pairs (B, D), (B, D) -> (B,), in float32 or float64, for `distance_metric` of `TripletLoss`.

    Like sentence-transformers' class of this name, it holds functions, which are no members of an enumeration.
    """

    COSINE = _cosine
    EUCLIDEAN = _euclidean
    MANHATTAN = _manhattan


class TripletLoss(nn.Module):
    """An anchor should be nearer to its positive than to its negative, by a margin.

    Drop-in for sentence-transformers' class of this name: the same arguments, values and gradients. The loss is the
    mean of relu(d(anchor, positive) - d(anchor, negative) + margin). Both distances take one pass over the embeddings,
    and so do all three gradients.

    Columns are (anchor, positive, negative); labels are ignored.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer.
        distance_metric: a function of `TripletDistanceMetric`, sentence-transformers' of the same name, or any
            callable (B, D), (B, D) -> (B,).
        triplet_margin: how much farther than the positive the negative should be.

    Raises:
        ColumnsError (a ShapeError and ValueError): at the call, for other than three columns.
        ShapeError, DtypeError, DeviceError: at the call, for embeddings that do not fit together.

    Cost: see `tileloss.functional.paired_distance`.

    Source: Hermans, Beyer and Leibe 2017 (arXiv 1703.07737), equation 1.

    >>> loss = TripletLoss(model)  # doctest: +SKIP
    >>> loss([anchor_features, positive_features, negative_features], None).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        distance_metric: DistanceFn = TripletDistanceMetric.EUCLIDEAN,
        triplet_margin: float = 5,
    ) -> None:
        super().__init__()
        self.model = model
        self.distance_metric = distance_metric
        self.triplet_margin = triplet_margin

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss (0-dim) of one batch: three feature dicts, in the order anchor, positive, negative."""
        columns = list(sentence_features)
        expect_columns(self, columns, _COLUMNS)
        return self.compute_loss_from_embeddings(embed_columns(self.model, columns), labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss (0-dim) of embeddings (B, D) of the three columns, in the order anchor, positive, negative."""
        expect_columns(self, embeddings, _COLUMNS)
        anchors, *others = embeddings
        measure = stock_name(self.distance_metric, TripletDistanceMetric).lower()
        if measure:
            to_positive, to_negative = paired_columns(anchors, others, measure)
        else:
            to_positive, to_negative = (self.distance_metric(anchors, other) for other in others)
        if measure == "cosine":  # a similarity: the distances, one minus these, differ by as much the other way
            to_positive, to_negative = to_negative, to_positive
        return F.relu(to_positive - to_negative + self.triplet_margin).mean()

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        return {
            "distance_metric": metric_name(self.distance_metric, TripletDistanceMetric),
            "triplet_margin": self.triplet_margin,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper that this loss is cited by."""
        return citations.HERMANS_2017
