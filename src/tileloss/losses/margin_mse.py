"""A student learns by how much a teacher prefers one document of a query to another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from tileloss.errors import MissingError, ShapeError
from tileloss.functional.margins import dot_margins
from tileloss.losses import citations
from tileloss.losses.columns import embed_columns, expect_columns
from tileloss.losses.paired_scores import paired_scores
from tileloss.paired import PAIRED, pairwise_dot_score, recognise_paired
from tileloss.similarity import SimilarityFn, similarity_fct_name

_COLUMNS = ("query", "positive", "negative")


class MarginMSELoss(nn.Module):
    """The margin between a query's positive and its negatives should be the margin that a teacher gives them.

    Drop-in for sentence-transformers' class of this name: the same arguments, columns, values and gradients. The loss
    is the mean, over queries and negatives, of the squared difference between s(query, positive) - s(query, negative)
    and the teacher's margin. All similarities take one pass over the embeddings, and so do all gradients: a query's is
    written once, however many negatives it has.

    Columns are (query, positive, negative_1[, ..., negative_N]). Labels are the teacher's margins (B, N), or (B,) for
    one negative, or its scores (B, 1 + N) of the positive and the negatives.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer.
        similarity_fct: a function of `tileloss.paired`, sentence-transformers' of the same name, the bound
            `model.similarity_pairwise`, or any callable (B, D), (B, D) -> (B,).

    Attributes:
        loss_fct: compares the student's margins (B, N) with the teacher's: the mean squared error.

    Raises:
        ColumnsError (a ShapeError and ValueError): at the call, for fewer than three columns.
        ShapeError (a ValueError): at the call, for labels of another shape.
        MissingError (an AttributeError): at the call, without labels.
        ShapeError, DtypeError, DeviceError: at the call, for embeddings that do not fit together.

    Cost: see `tileloss.functional.paired_similarity`.

    Source: Hofstätter et al. 2020 (arXiv 2010.02666), section 3.3.

    >>> loss = MarginMSELoss(model)  # doctest: +SKIP
    >>> loss([query_features, positive_features, negative_features], margins).backward()  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, similarity_fct: SimilarityFn = pairwise_dot_score) -> None:
        super().__init__()
        self.model = model
        self.similarity_fct = similarity_fct
        self.loss_fct = nn.MSELoss()

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor) -> Tensor:
        """The loss (0-dim) of one batch: a feature dict for each column, and the teacher's margins or scores."""
        columns = list(sentence_features)
        expect_columns(self, columns, _COLUMNS, more=True)
        return self.compute_loss_from_embeddings(embed_columns(self.model, columns), labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss (0-dim) of embeddings (B, D) of each column, in the order query, positive, negatives."""
        expect_columns(self, embeddings, _COLUMNS, more=True)
        queries, *docs = embeddings
        margins = _margins(labels, len(queries), len(docs) - 1)
        if len(docs) == 2 and recognise_paired(self.similarity_fct) == "dot":
            return self.loss_fct(dot_margins(queries, *docs).unsqueeze(1), margins)
        positives, negatives = paired_scores(self.similarity_fct, queries, docs).split([1, len(docs) - 1], dim=1)
        return self.loss_fct(positives - negatives, margins)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        return {"similarity_fct": similarity_fct_name(self.similarity_fct, PAIRED)}

    @property
    def citation(self) -> str:
        """BibTeX of the paper that introduced the loss."""
        return citations.HOFSTAETTER_2021


def _margins(
    labels: Tensor | None,  # (B,), (B, N) or (B, 1 + N)
    size: int,
    negatives: int,
) -> Tensor:  # (B, N)
    """The teacher's margins, whichever form they were given in."""
    if labels is None:
        raise MissingError("MarginMSELoss needs labels: the teacher's margins, or its scores, for each query.")
    labels = labels.detach()
    if labels.shape == (size, negatives + 1):
        return labels[:, :1] - labels[:, 1:]
    margins = labels.unsqueeze(1) if labels.shape == (size,) else labels
    if margins.shape != (size, negatives):
        raise ShapeError(
            f"Labels shape {tuple(labels.shape)} does not match expected shape {(size, negatives)}: for each negative "
            "a margin, the teacher's score of the positive less that of the negative. The scores themselves may be "
            f"given as {(size, negatives + 1)}, the positive's first."
        )
    return margins
