"""Contrastive learning from the hard pairs of a batch alone: near negatives and far positives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tileloss.losses.columns import embed_columns, expect_columns
from tileloss.losses.contrastive import COLUMNS, SiameseDistanceMetric, pair_distances, warn_unless_binary
from tileloss.losses.distance_metrics import DistanceFn, metric_name
from tileloss.losses.labels import one_label_each
from tileloss.similarity import rounded_as


class OnlineContrastiveLoss(nn.Module):
    """Contrastive learning from the hard pairs of a batch alone: near negatives and far positives.

    Drop-in for sentence-transformers' class of this name: the same arguments, values and gradients. Negatives count
    that are nearer than the farthest positive, and positives that are farther than the nearest negative; without pairs
    of the other label, those on the wrong side of their own mean. The loss is the sum of d^2 over these positives, and
    of relu(margin - d)^2 over these negatives. Which pairs are hard is found by masks of the size of the labels, so
    that a GPU is never waited for after the first call.

    Columns are (anchor, positive or negative), labels 1 for positives and 0 for negatives. Pairs of any other label
    are left out, and a `UserWarning` says so at the first call.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer.
        distance_metric: a function of `SiameseDistanceMetric`, sentence-transformers' of the same name, or any
            callable (B, D), (B, D) -> (B,).
        margin: how far apart negatives should be.

    Raises:
        ShapeError (a ValueError and IndexError): at the call, for a single column, or labels that are not one a pair.
        MissingError (an AttributeError): at the call, without labels.

    Cost: see `tileloss.functional.paired_distance`.

    Source: Hadsell, Chopra and LeCun 2006 (doi 10.1109/CVPR.2006.100) for the two terms; the selection is
    sentence-transformers'.

    >>> loss = OnlineContrastiveLoss(model)  # doctest: +SKIP
    >>> loss([anchor_features, other_features], torch.tensor([1, 0])).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        distance_metric: DistanceFn = SiameseDistanceMetric.COSINE_DISTANCE,
        margin: float = 0.5,
    ) -> None:
        super().__init__()
        self.model = model
        self.margin = margin
        self.distance_metric = distance_metric
        self._checked_labels = False

    def forward(
        self,
        sentence_features: Iterable[dict[str, Any]],
        labels: Tensor,
        size_average: bool = False,
    ) -> Tensor:
        """The loss (0-dim) of one batch: two feature dicts, and 0 or 1 for each pair. `size_average` has no effect."""
        columns = list(sentence_features)
        expect_columns(self, columns, COLUMNS, more=True)
        return self.compute_loss_from_embeddings(embed_columns(self.model, columns), labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss (0-dim) of embeddings (B, D) of the first two columns, in their dtype, and 0 or 1 for each."""
        expect_columns(self, embeddings, COLUMNS, more=True)
        anchors, others = embeddings[:2]
        labels = one_label_each(self, labels, anchors, "1 for positives and 0 for negatives,")
        if not (self._checked_labels or torch.compiler.is_compiling()):  # a compiler cannot look at values
            self._checked_labels = True
            warn_unless_binary(self, labels, "their pairs left out, being neither positives nor negatives")
        distances = pair_distances(self.distance_metric, anchors, others)
        loss = _of_hard_pairs(distances, labels == 1, labels == 0, self.margin)
        return rounded_as(loss, anchors, others)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        return {
            "distance_metric": metric_name(self.distance_metric, SiameseDistanceMetric),
            "margin": self.margin,
        }


def _of_hard_pairs(
    distances: Tensor,  # (B,)
    positive: Tensor,  # (B,) boolean
    negative: Tensor,  # (B,) boolean
    margin: float,
) -> Tensor:
    if len(distances) == 0:  # of nothing there is no maximum
        return distances.sum()
    values = distances.detach()
    far = torch.where(positive, values, float("-inf")).amax()
    near = torch.where(negative, values, float("inf")).amin()
    counted = positive | negative
    mean = torch.where(counted, values, 0.0).sum() / counted.sum()  # asked for where all have the same label
    is_hard_positive = positive & (values > torch.where(near == float("inf"), mean, near))
    is_hard_negative = negative & (values < torch.where(far == float("-inf"), mean, far))
    pushed = torch.where(is_hard_negative, F.relu(margin - distances), 0.0)
    return torch.where(is_hard_positive, distances, pushed).square().sum()
