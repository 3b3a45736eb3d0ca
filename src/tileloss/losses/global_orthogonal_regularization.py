"""Texts that have nothing to do with each other should be spread out, as random directions are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tileloss.errors import InputError
from tileloss.functional.dispersion import dispersion
from tileloss.losses import citations
from tileloss.losses.columns import embed_columns, expect_columns
from tileloss.similarity import SimilarityFn, cos_sim, similarity_fct_name

_AGGREGATIONS = ("mean", "sum")


class GlobalOrthogonalRegularizationLoss(nn.Module):
    """The similarities of different texts of a column should have a mean of zero, and squares of at most 1/D.

    Drop-in for sentence-transformers' class of this name: the same arguments, values and gradients, without the matrix
    of batch by batch. Of each column by itself, with m the mean of the similarities of all pairs of different texts
    and s the mean of their squares, it is m^2 and relu(s - 1/D): directions in D dimensions that are drawn at random
    cost next to nothing. It is meant to go with a loss that pulls pairs together.

    Any number of columns, of any lengths; labels are ignored.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer.
        similarity_fct: `tileloss.similarity.cos_sim` or `dot_score`, sentence-transformers' functions of those names,
            or any callable (B, D), (B, D) -> (B, B), whose matrix is held.
        mean_weight: what m^2 is multiplied by; None or 0 leaves it out.
        second_moment_weight: what relu(s - 1/D) is multiplied by; None or 0 leaves it out.
        aggregation: "mean" or "sum" over the columns.

    Raises:
        InputError (a ValueError): at construction, without any weight, or for another aggregation.
        ColumnsError (a ValueError): at the call, without any column.
        ShapeError, DtypeError: at the call, for embeddings that are no matrices of floating-point numbers.

    Cost: see `tileloss.functional.dispersion`.

    Source: Zhang, Yu, Kumar, Chang 2017 (arXiv 1708.06320), equation 6; aggregation by "sum" without the mean is that
    of EmbeddingGemma (2509.20354).

    >>> loss = GlobalOrthogonalRegularizationLoss(model)  # doctest: +SKIP
    >>> sum(loss([query_features, doc_features]).values()).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        similarity_fct: SimilarityFn = cos_sim,
        mean_weight: float | None = 1.0,
        second_moment_weight: float | None = 1.0,
        aggregation: str = "mean",
    ) -> None:
        super().__init__()
        if not mean_weight and not second_moment_weight:
            raise InputError(
                "At least one of mean_weight or second_moment_weight must be non-zero, or there is no loss."
            )
        if aggregation not in _AGGREGATIONS:
            raise InputError(f"aggregation must be 'mean' or 'sum', got {aggregation!r}.")
        self.model = model
        self.similarity_fct = similarity_fct
        self.mean_weight = mean_weight
        self.second_moment_weight = second_moment_weight
        self.aggregation = aggregation

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> dict[str, Tensor]:
        """As `compute_loss_from_embeddings`, of one batch: a feature dict for each column."""
        columns = list(sentence_features)
        expect_columns(self, columns, ("text",), more=True)
        return self.compute_loss_from_embeddings(embed_columns(self.model, columns), labels)

    def compute_loss_from_embeddings(
        self, embeddings: Sequence[Tensor], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The terms of the loss by name (0-dim each), of embeddings (B, D) of each column.

        They are "gor_mean" and "gor_second_moment", weighted; one without a weight is left out.
        """
        expect_columns(self, embeddings, ("text",), more=True)
        means, second_moments = zip(*map(self.compute_gor, embeddings), strict=True)
        terms = {}
        if self.mean_weight:
            terms["gor_mean"] = self.mean_weight * self._aggregated(torch.stack(means))
        if self.second_moment_weight:
            terms["gor_second_moment"] = self.second_moment_weight * self._aggregated(torch.stack(second_moments))
        return terms

    def _aggregated(
        self,
        terms: Tensor,  # (columns,)
    ) -> Tensor:
        return terms.sum() if self.aggregation == "sum" else terms.mean()

    def compute_gor(
        self,
        embeddings: Tensor,  # (B, D)
    ) -> tuple[Tensor, Tensor]:
        """Both terms (0-dim) of one column, unweighted: the squared mean, and the second moment above 1/D."""
        spread = dispersion(embeddings, similarity=self.similarity_fct)
        return spread.mean.square(), torch.relu(spread.second_moment - 1 / embeddings.shape[1])

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        name = getattr(self.similarity_fct, "__name__", similarity_fct_name(self.similarity_fct))
        return {
            "similarity_fct": name,
            "mean_weight": self.mean_weight,
            "second_moment_weight": self.second_moment_weight,
            "aggregation": self.aggregation,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper that introduced the regulariser."""
        return citations.ZHANG_2017
