"""Of each text of a labelled batch the farthest of its class and the nearest of another; the distances for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tileloss.functional.pairwise import pairwise_distance
from tileloss.losses.mined_triplets import MinedTripletLoss


class BatchHardTripletLossDistanceFunction:
    """Distances between all rows of a batch, for the `distance_metric` of the losses that mine triplets.

    The losses know these functions and compute the same without the matrix; called by hand, they return it.
    """

    @staticmethod
    def cosine_distance(
        embeddings: Tensor,  # (B, D)
    ) -> Tensor:  # (B, B)
        """1 - cosine similarity, in float32 or float64."""
        return pairwise_distance(embeddings, metric="cosine")

    @staticmethod
    def euclidean_distance(
        embeddings: Tensor,  # (B, D)
        squared: bool = False,
    ) -> Tensor:  # (B, B)
        """Euclidean distance, or its square, in float32 or float64. A distance of zero has gradient zero."""
        return pairwise_distance(embeddings, metric="squared_euclidean" if squared else "euclidean")

    # a misspelling that scripts use
    eucledian_distance = euclidean_distance


class BatchHardTripletLoss(MinedTripletLoss):
    """For every text, the farthest of its class should be nearer than the nearest of other classes, by a margin.

    Drop-in for sentence-transformers' class of this name: the same arguments, values and gradients, from distances
    that are never held whole. The loss is the mean over all texts of max(d(farthest positive) - d(nearest negative) +
    margin, 0). A text without a positive takes zero for that distance; one without a negative takes for that the
    distance of the farthest text, so that a batch of one class gives the margin, and no gradient.

    One column of texts; labels are classes, (B,) or (B, 1) numbers. Batches need at least two texts of a class, and
    two classes. Formula, cost and sources: `tileloss.functional.triplet_loss`.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer.
        distance_metric: a function of `BatchHardTripletLossDistanceFunction`, sentence-transformers' of the same name,
            either with `functools.partial(euclidean_distance, squared=True)`, or any callable (B, D) -> (B, B). A
            callable of your own is given all rows at once, and its matrix is held.
        margin: how much farther away a negative should be than a positive.

    Attributes:
        sentence_embedder: the model.
        stats: the `TripletStats` of the last call. None before the first.

    Raises:
        ShapeError (a ValueError): at the call, for labels that are not one for each text, or an empty batch.
        MissingError (an AttributeError): at the call, without labels.
        InputError (a ValueError): at the call, for labels that are nan, or a margin that is no finite number.

    >>> loss = BatchHardTripletLoss(model)  # doctest: +SKIP
    >>> loss([features], labels).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        distance_metric: Callable[[Tensor], Tensor] = BatchHardTripletLossDistanceFunction.euclidean_distance,
        margin: float = 5,
    ) -> None:
        super().__init__(model, distance_metric)
        self.triplet_margin = margin

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss (0-dim) of the embeddings (B, D) of the first column, and the class of each."""
        return self.batch_hard_triplet_loss(labels, embeddings[0])

    def batch_hard_triplet_loss(
        self,
        labels: Tensor,  # (B,)
        embeddings: Tensor,  # (B, D)
    ) -> Tensor:
        """The same, by an older name and with the labels first."""
        return self._mine("hard", self.triplet_margin, labels, embeddings)

    @staticmethod
    def get_triplet_mask(
        labels: Tensor,  # (B,)
    ) -> Tensor:  # (B, B, B) boolean
        """Whether (anchor, positive, negative) is a triplet: two rows of one class and one of another."""
        positive = BatchHardTripletLoss.get_anchor_positive_triplet_mask(labels)
        negative = BatchHardTripletLoss.get_anchor_negative_triplet_mask(labels)
        return positive[:, :, None] & negative[:, None, :]

    @staticmethod
    def get_anchor_positive_triplet_mask(
        labels: Tensor,  # (B,)
    ) -> Tensor:  # (B, B) boolean
        """Whether two rows are different ones of the same class."""
        return (labels[:, None] == labels).fill_diagonal_(False)

    @staticmethod
    def get_anchor_negative_triplet_mask(
        labels: Tensor,  # (B,)
    ) -> Tensor:  # (B, B) boolean
        """Whether two rows are of different classes."""
        return torch.ne(labels[:, None], labels)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        return super().get_config_dict() | {"margin": self.triplet_margin}
