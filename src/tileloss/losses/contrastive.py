"""Pairs that belong together should be near, and others at least a margin apart."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tileloss.errors import DtypeError
from tileloss.functional import paired_distance
from tileloss.losses import citations
from tileloss.losses.columns import embed_columns, expect_columns
from tileloss.losses.distance_metrics import DistanceFn, metric_name, stock_name
from tileloss.losses.labels import one_label_each
from tileloss.similarity import up

COLUMNS = ("anchor", "positive or negative")
_EPS = 1e-6  # what torch.nn.functional.pairwise_distance adds to every difference


def _euclidean(
    x: Tensor,  # (B, D)
    y: Tensor,  # (B, D)
) -> Tensor:  # (B,)
    """Euclidean distance of each row of `x` to that of `y`, with 1e-6 added to every difference."""
    return paired_distance(x, y, metric="euclidean", eps=_EPS)


def _manhattan(
    x: Tensor,  # (B, D)
    y: Tensor,  # (B, D)
) -> Tensor:  # (B,)
    """Manhattan distance of each row of `x` to that of `y`, with 1e-6 added to every difference."""
    return paired_distance(x, y, metric="manhattan", eps=_EPS)


def _cosine_distance(
    x: Tensor,  # (B, D)
    y: Tensor,  # (B, D)
) -> Tensor:  # (B,)
    """1 - cosine similarity of each row of `x` with that of `y`."""
    return paired_distance(x, y, metric="torch_cosine")


class SiameseDistanceMetric(Enum):
    """Distances of pairs (B, D), (B, D) -> (B,), in float32 or float64, for `distance_metric` of contrastive losses.

    Like sentence-transformers' class of this name, it holds functions, which are no members of an enumeration.
    """

    EUCLIDEAN = _euclidean
    MANHATTAN = _manhattan
    COSINE_DISTANCE = _cosine_distance


def pair_distances(
    metric: DistanceFn,
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D)
) -> Tensor:  # (B,)
    """The distance of each pair, in one pass where the metric is a stock one, ours or sentence-transformers'."""
    name = stock_name(metric, SiameseDistanceMetric)
    return (getattr(SiameseDistanceMetric, name) if name else metric)(a, b)


class ContrastiveLoss(nn.Module):
    """Pairs that belong together should be near, and others at least a margin apart.

    Drop-in for sentence-transformers' class of this name: the same arguments, values and gradients. With the distance
    d of a pair and its label y, the loss is the mean, or the sum, of (y d^2 + (1 - y) relu(margin - d)^2) / 2. Labels
    between 0 and 1 weigh the two terms; a `UserWarning` says so at the first call. Distances and gradients take one
    pass over the embeddings each.

    Columns are (anchor, positive or negative), labels 1 for positives and 0 for negatives.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer.
        distance_metric: a function of `SiameseDistanceMetric`, sentence-transformers' of the same name, or any
            callable (B, D), (B, D) -> (B,).
        margin: how far apart negatives should be.
        size_average: take the mean over pairs, not the sum.

    Raises:
        ColumnsError (an AssertionError): at the call, for other than two columns.
        ShapeError (a ValueError): at the call, for labels that are not one for each pair.
        MissingError (an AttributeError): at the call, without labels.
        DtypeError (a RuntimeError): at the call, for boolean labels.

    Cost: see `tileloss.functional.paired_distance`.

    Source: Hadsell, Chopra and LeCun 2006 (doi 10.1109/CVPR.2006.100).

    >>> loss = ContrastiveLoss(model)  # doctest: +SKIP
    >>> loss([anchor_features, other_features], torch.tensor([1, 0])).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        distance_metric: DistanceFn = SiameseDistanceMetric.COSINE_DISTANCE,
        margin: float = 0.5,
        size_average: bool = True,
    ) -> None:
        super().__init__()
        self.distance_metric = distance_metric
        self.margin = margin
        self.model = model
        self.size_average = size_average
        self._checked_labels = False

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor) -> Tensor:
        """The loss (0-dim) of one batch: two feature dicts, and 0 or 1 for each pair."""
        columns = list(sentence_features)
        expect_columns(self, columns, COLUMNS)
        return self.compute_loss_from_embeddings(embed_columns(self.model, columns), labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss (0-dim) of embeddings (B, D) of the two columns, and 0 or 1 for each pair."""
        expect_columns(self, embeddings, COLUMNS)
        anchors, others = embeddings
        labels = one_label_each(self, labels, anchors, "1 for positives and 0 for negatives,")
        if labels.dtype == torch.bool:
            raise DtypeError(
                "ContrastiveLoss weighs by its labels, which must be numbers, got booleans; use .float()."
            )
        if not (self._checked_labels or torch.compiler.is_compiling()):  # a compiler cannot look at values
            self._checked_labels = True
            warn_unless_binary(self, labels, "weigh the two terms of the loss, with label and 1 - label")
        distances = up(pair_distances(self.distance_metric, anchors, others))
        missed = F.relu(self.margin - distances)
        # the label's share of the one square, and what is left of the other
        losses = torch.lerp(missed.square(), distances.square(), labels.to(distances.dtype))
        return 0.5 * (losses.mean() if self.size_average else losses.sum())

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        return {
            "distance_metric": metric_name(self.distance_metric, SiameseDistanceMetric),
            "margin": self.margin,
            "size_average": self.size_average,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper that introduced this loss."""
        return citations.HADSELL_2006


def warn_unless_binary(
    loss: nn.Module,
    labels: Tensor,  # (B,)
    otherwise: str,
) -> None:
    """A `UserWarning` for labels other than 0 and 1, which says what others do. On a GPU it waits for the labels."""
    if ((labels != 0) & (labels != 1)).any():
        message = f"{type(loss).__name__} expects binary labels (0 or 1). Others are accepted, and {otherwise}."
        warnings.warn(message, UserWarning, stacklevel=6)  # whoever called the loss
