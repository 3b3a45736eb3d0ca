"""A student's embeddings should be a teacher's, by the mean squared error."""

from __future__ import annotations

from typing import Any

from torch import nn

from tileloss.losses import citations
from tileloss.losses.embed_distill import EmbedDistillLoss


class MSELoss(EmbedDistillLoss):
    """The mean squared difference between the embeddings of each column and those that a teacher made.

    Drop-in for sentence-transformers' class of this name: `EmbedDistillLoss`, which states columns, labels, errors and
    cost, with distance_metric="mse". With translations as columns and one teacher embedding for all of them, it
    teaches a model languages.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer.
        projection_dim: if set, the width to which a trained linear layer takes the student's embeddings.

    Source: Reimers and Gurevych 2020 (arXiv 2004.09813), equation 1.

    >>> loss = MSELoss(model)  # doctest: +SKIP
    >>> loss([english_features, french_features], teacher_embeddings).backward()  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, projection_dim: int | None = None) -> None:
        super().__init__(model, distance_metric="mse", projection_dim=projection_dim)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        return {"projection_dim": self.projection_dim}

    @property
    def citation(self) -> str:
        """BibTeX of the paper that introduced the loss."""
        return citations.REIMERS_2020
