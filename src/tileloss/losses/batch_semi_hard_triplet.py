"""Of each pair of one class in a labelled batch the negative that comes right after the positive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from tileloss.losses.batch_hard_triplet import BatchHardTripletLossDistanceFunction
from tileloss.losses.mined_triplets import MinedTripletLoss


class BatchSemiHardTripletLoss(MinedTripletLoss):
    """For every pair of one class, the next text of another class should be farther than the pair, by a margin.

    Drop-in for sentence-transformers' class of this name: the same arguments, values and gradients, from distances
    that are never held whole. The loss is the mean over the pairs (anchor, positive) of max(d(anchor, positive) -
    d(anchor, negative) + margin, 0), where the negative is the nearest of those that are farther away than the
    positive, and where there is none the farthest. In a batch without negatives their distance counts as zero.

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

    >>> loss = BatchSemiHardTripletLoss(model)  # doctest: +SKIP
    >>> loss([features], labels).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        distance_metric: Callable[[Tensor], Tensor] = BatchHardTripletLossDistanceFunction.euclidean_distance,
        margin: float = 5,
    ) -> None:
        super().__init__(model, distance_metric)
        self.margin = margin

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss (0-dim) of the embeddings (B, D) of the first column, and the class of each."""
        return self.batch_semi_hard_triplet_loss(labels, embeddings[0])

    def batch_semi_hard_triplet_loss(
        self,
        labels: Tensor,  # (B,)
        embeddings: Tensor,  # (B, D)
    ) -> Tensor:
        """The same, by an older name and with the labels first."""
        return self._mine("semi_hard", self.margin, labels, embeddings)

    @staticmethod
    def _masked_maximum(
        data: Tensor,  # (N, M)
        mask: Tensor,  # (N, M): what counts
        dim: int = 1,
    ) -> Tensor:
        """The largest entries that count, along `dim`, which is kept; the smallest of all where none does."""
        smallest = data.amin(dim, keepdim=True)
        return ((data - smallest) * mask).amax(dim, keepdim=True) + smallest

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        return super().get_config_dict() | {"margin": self.margin}
