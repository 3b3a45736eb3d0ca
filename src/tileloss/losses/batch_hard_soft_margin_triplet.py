"""Of each text of a labelled batch the farthest of its class and the nearest of another, with no margin to choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from tileloss.losses.batch_hard_triplet import BatchHardTripletLoss, BatchHardTripletLossDistanceFunction
from tileloss.losses.mined_triplets import MinedTripletLoss


class BatchHardSoftMarginTripletLoss(BatchHardTripletLoss):
    """For every text, the farthest of its class should be nearer than the nearest of other classes.

    As `BatchHardTripletLoss`, with softplus(d(farthest positive) - d(nearest negative)) in the place of the hinge:
    there is no margin, and no triplet stops pulling. Its texts, labels, attributes, errors and cost are the same.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer.
        distance_metric: a function of `BatchHardTripletLossDistanceFunction`, sentence-transformers' of the same name,
            either with `functools.partial(euclidean_distance, squared=True)`, or any callable (B, D) -> (B, B). A
            callable of your own is given all rows at once, and its matrix is held.

    >>> loss = BatchHardSoftMarginTripletLoss(model)  # doctest: +SKIP
    >>> loss([features], labels).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        distance_metric: Callable[[Tensor], Tensor] = BatchHardTripletLossDistanceFunction.euclidean_distance,
    ) -> None:
        super().__init__(model, distance_metric)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss (0-dim) of the embeddings (B, D) of the first column, and the class of each."""
        return self.batch_hard_triplet_soft_margin_loss(labels, embeddings[0])

    def batch_hard_triplet_soft_margin_loss(
        self,
        labels: Tensor,  # (B,)
        embeddings: Tensor,  # (B, D)
    ) -> Tensor:
        """The same, by an older name and with the labels first."""
        return self._mine("hard", "soft", labels, embeddings)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        return MinedTripletLoss.get_config_dict(self)
