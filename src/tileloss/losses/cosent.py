"""Pairs of texts should be ordered by their similarity as their labels order them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from tileloss.errors import ShapeError
from tileloss.functional import ranking_loss
from tileloss.losses import citations
from tileloss.losses.columns import embed_columns, expect_columns
from tileloss.losses.labels import one_label_each
from tileloss.losses.prefixes import PRODUCTS, Prefixes, paired_loss
from tileloss.losses.wrapping import replaced
from tileloss.paired import PAIRED, pairwise_cos_sim, recognise_paired
from tileloss.similarity import SimilarityFn, similarity_fct_name, up


class CoSENTLoss(nn.Module):
    """Pairs of texts should be ordered by their similarity as their labels order them.

    Drop-in for sentence-transformers' class of this name: the same arguments, values and gradients. The loss is
    log(1 + sum of exp(scale * (s(k) - s(i)))) over all pairs of texts k and i of which k has the lower label; where
    labels are equal nothing is compared. Similarities and their gradients take one pass over the embeddings each, and
    the sum O(B log B).

    Columns are (text, text), of which more are embedded and ignored; labels are one number for each pair.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer.
        scale: what similarities are multiplied by (1 / temperature).
        similarity_fct: a function of `tileloss.paired`, sentence-transformers' of the same name, the bound
            `model.similarity_pairwise`, or any callable (B, D), (B, D) -> (B,).

    Raises:
        ColumnsError (a ShapeError, ValueError and IndexError): at the call, for a single column.
        ShapeError (a ValueError): at the call, for labels, or results of a callable, that are not one a pair.
        MissingError (an AttributeError): at the call, without labels.
        InputError (a ValueError): at the call, for labels that are nan, on a CPU.

    Cost: see `tileloss.functional.paired_similarity` and `tileloss.functional.ranking_loss`.

    Source: Huang et al. 2024 (doi 10.1109/TASLP.2024.3402087).

    >>> loss = CoSENTLoss(model)  # doctest: +SKIP
    >>> loss([first_features, second_features], torch.tensor([0.9, 0.1])).backward()  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, scale: float = 20.0, similarity_fct: SimilarityFn = pairwise_cos_sim) -> None:
        super().__init__()
        self.model = model
        self.similarity_fct = similarity_fct
        self.scale = scale
        self._prefixes: Prefixes | None = None

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor) -> Tensor:
        """The loss (0-dim) of one batch: a feature dict for each column, and a number for each pair."""
        columns = list(sentence_features)
        expect_columns(self, columns, ("text", "text"), more=True)
        return self.compute_loss_from_embeddings(embed_columns(self.model, columns), labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss (0-dim) of embeddings (B, D) of the first two columns, and a number for each pair."""
        expect_columns(self, embeddings, ("text", "text"), more=True)
        first, second = embeddings[:2]
        labels = one_label_each(self, labels, first, "the similarity")
        known = recognise_paired(self.similarity_fct)
        if isinstance(known, str):
            return paired_loss(self._prefixes, first, second, known, lambda scores: self._ranked(scores, labels))
        return self._ranked(known(first, second), labels)

    def at_prefixes(self, prefixes: Prefixes) -> AbstractContextManager[None] | None:
        """A block in which a call is the weighted sum over widths; see `tileloss.losses.prefixes`."""
        cosine = recognise_paired(self.similarity_fct) in PRODUCTS
        return replaced(self, "_prefixes", prefixes) if cosine else None

    def _ranked(
        self,
        scores: Tensor,  # (B,)
        labels: Tensor,  # (B,)
    ) -> Tensor:
        if labels.shape != scores.shape:
            raise ShapeError(
                f"Labels and scores must have the same shape, got {tuple(labels.shape)} and {tuple(scores.shape)}: "
                "similarity_fct gives one number for each pair of rows."
            )
        return ranking_loss(up(scores) * self.scale, labels.to(scores.device))

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        name = getattr(self.similarity_fct, "__name__", similarity_fct_name(self.similarity_fct, PAIRED))
        return {"scale": self.scale, "similarity_fct": name}

    @property
    def citation(self) -> str:
        """BibTeX of the paper that introduced the loss."""
        return citations.HUANG_2024
