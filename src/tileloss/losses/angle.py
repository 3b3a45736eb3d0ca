"""Pairs of texts ordered by how close they are as complex vectors, whose similarity does not flatten near one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tileloss.errors import MissingError
from tileloss.losses import citations
from tileloss.losses.columns import expect_columns
from tileloss.losses.cosent import CoSENTLoss
from tileloss.losses.labels import one_label_each
from tileloss.losses.paired_scores import paired_scores
from tileloss.paired import pairwise_angle_sim


class AnglELoss(CoSENTLoss):
    """Pairs of texts should be ordered as their labels order them, by their closeness as complex vectors.

    Drop-in for sentence-transformers' class of this name: the same arguments, values and gradients. The loss is
    `CoSENTLoss` with `tileloss.paired.pairwise_angle_sim`, whose gradient does not vanish where two texts are nearly
    alike. All similarities take one pass over the embeddings, and so do all gradients: a query is neither copied nor
    its gradient written more than once, however many negatives it has.

    Columns are (text, text) with one number for each pair, as for `CoSENTLoss`; or (query, positive, negative_1[, ...,
    negative_N]), all of whose pairs are ranked together: those of the positives are labelled by `labels`, or 1 without
    any, and those of the negatives by 1 - label.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer.
        scale: what similarities are multiplied by (1 / temperature).

    Raises:
        ColumnsError (a ShapeError, ValueError and IndexError): at the call, for a single column.
        ShapeError (a ValueError): at the call, for labels that are not one for each row.
        MissingError (a ValueError): at the call, for two columns without labels.
        InputError (a ValueError): at the call, for labels that are nan, on a CPU.

    Cost: see `tileloss.functional.paired_similarity` and `tileloss.functional.ranking_loss`.

    Source: Li and Li 2024 (arXiv 2309.12871), section 3.4.

    >>> loss = AnglELoss(model)  # doctest: +SKIP
    >>> loss([query_features, positive_features, negative_features], None).backward()  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, scale: float = 20.0) -> None:
        super().__init__(model, scale, similarity_fct=pairwise_angle_sim)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss (0-dim) of embeddings (B, D) of each column, and a number for each row."""
        expect_columns(self, embeddings, ("text", "text"), more=True)
        queries, *docs = embeddings
        if len(docs) == 1:
            if labels is None:
                raise MissingError("AnglELoss requires labels for datasets with pairs: a number for each, to rank by.")
            return super().compute_loss_from_embeddings(embeddings, labels)
        if labels is None:
            labels = torch.ones(len(queries), device=queries.device)
        of_positives = one_label_each(self, labels, queries, "the similarity to the positive")
        of_negatives = (1 - of_positives).repeat(len(docs) - 1)
        scores = paired_scores(self.similarity_fct, queries, docs).t().reshape(-1)
        return self._ranked(scores, torch.cat([of_positives, of_negatives]))

    @property
    def citation(self) -> str:
        """BibTeX of the paper that introduced the loss."""
        return citations.LI_AOE_2024
