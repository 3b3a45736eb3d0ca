"""What the four losses that mine triplets from a labelled batch have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from tileloss.functional.triplet import TripletStats, mined, statistics
from tileloss.losses import citations
from tileloss.losses.labels import one_label_each
from tileloss.losses.named_model import NamedModelLoss


class MinedTripletLoss(NamedModelLoss):
    """One column of texts, a class for each, a distance, and a model that is held as `sentence_embedder`."""

    _holds_model_as = "sentence_embedder"

    def __init__(self, model: nn.Module, distance_metric: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.sentence_embedder = model
        self.distance_metric = distance_metric
        self._last: tuple[Tensor, Tensor, Tensor, Tensor, str] | None = None

    def forward(self, sentence_features: Sequence[dict[str, Any]], labels: Tensor) -> Tensor:
        """The loss (0-dim) of one batch: a list whose first feature dict is embedded, and the class of each text."""
        embeddings = self.sentence_embedder(sentence_features[0])["sentence_embedding"]
        return self.compute_loss_from_embeddings([embeddings], labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss (0-dim) of the embeddings (B, D) of the first column, and the class of each."""
        raise NotImplementedError

    def _mine(self, mining: str, margin: float | str, labels: Tensor, embeddings: Tensor) -> Tensor:
        """The loss (0-dim); leaves in `_last` what its statistics are made of."""
        classes = one_label_each(self, labels, embeddings, "a class, a number,")
        found = mined(embeddings, classes, mining, margin, self.distance_metric)
        # without the loss, whose graph would live on; and past the module's own setter, whose time a small batch feels
        self.__dict__["_last"] = found.active, found.hardest_positive, found.hardest_negative, labels, mining
        return found.loss

    @property
    def stats(self) -> TripletStats | None:
        """The statistics of the last call, detached and made when they are asked for; None before the first."""
        return None if self._last is None else statistics(*self._last)

    @stats.setter
    def stats(self, nothing: None) -> None:
        """Setting them to None forgets the last call, and frees what it left behind."""
        self.__dict__["_last"] = nothing

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        return {"distance_metric": getattr(self.distance_metric, "__name__", str(self.distance_metric))}

    @property
    def citation(self) -> str:
        """BibTeX of the paper that compared these losses."""
        return citations.HERMANS_2017
