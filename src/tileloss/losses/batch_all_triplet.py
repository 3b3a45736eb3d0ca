"""Every triplet of a labelled batch that its distances leave in the wrong order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from tileloss.losses.batch_hard_triplet import BatchHardTripletLossDistanceFunction
from tileloss.losses.mined_triplets import MinedTripletLoss


class BatchAllTripletLoss(MinedTripletLoss):
    """For every text, those of its class should be nearer than those of other classes, by a margin.

    Drop-in for sentence-transformers' class of this name: the same arguments, values and gradients, from distances
    that are never held whole. The loss is the mean of max(d(anchor, positive) - d(anchor, negative) + margin, 0) over
    the triplets of the batch for which it is above zero. Where there are none, value and gradient are zero.

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

    >>> loss = BatchAllTripletLoss(model)  # doctest: +SKIP
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
        return self.batch_all_triplet_loss(labels, embeddings[0])

    def batch_all_triplet_loss(
        self,
        labels: Tensor,  # (B,)
        embeddings: Tensor,  # (B, D)
    ) -> Tensor:
        """The same, by an older name and with the labels first."""
        return self._mine("all", self.triplet_margin, labels, embeddings)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        return super().get_config_dict() | {"margin": self.triplet_margin}
