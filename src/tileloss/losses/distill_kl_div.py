"""A student learns how a teacher distributes its preference over the documents of a query."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tileloss.errors import ColumnsError, InputError, MissingError, ShapeError
from tileloss.losses import citations
from tileloss.losses.columns import embed_columns
from tileloss.losses.paired_scores import paired_scores
from tileloss.paired import PAIRED, pairwise_dot_score
from tileloss.similarity import SimilarityFn, similarity_fct_name

logger = logging.getLogger(__name__)

# where a float32 softmax gives exactly zero: exp(-104) is below its smallest number; rounded, for a message
_UNDERFLOW = 100.0


class DistillKLDivLoss(nn.Module):
    """A query's documents should share its preference as a teacher says: the KL divergence of two softmaxes.

    Drop-in for sentence-transformers' class of this name: the same arguments, columns, values and gradients. With z
    the similarities of a query with its N documents over the student's temperature, and t the softmax of the teacher's
    scores over the teacher's, the loss is the mean over queries of sum t (log t - log_softmax z), times the square of
    the student's temperature. All similarities take one pass over the embeddings, and so do all gradients: a query's
    is written once, however many documents it has.

    Columns are (query, document_1, document_2[, ..., document_N]); labels are the teacher's scores (B, N). A score of
    minus infinity leaves a document out.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer.
        similarity_fct: a function of `tileloss.paired`, sentence-transformers' of the same name, the bound
            `model.similarity_pairwise`, or any callable (B, D), (B, D) -> (B,).
        temperature: of both softmaxes, unless they are given their own.
        student_temperature: what the similarities are divided by.
        teacher_temperature: what the teacher's scores are divided by.

    Attributes:
        loss_fct: compares log-probabilities (B, N) with probabilities: `torch.nn.KLDivLoss`, the sum over B.

    Raises:
        InputError (a ValueError): at construction, for a temperature that is no positive finite number; at the first
            call, for scores that are nan. That call also warns of probabilities that are zero by underflow.
        ColumnsError (a ShapeError and ValueError): at the call, for fewer than three columns.
        ShapeError (a ValueError): at the call, for labels of another shape.
        MissingError (an AttributeError): at the call, without labels.
        ShapeError, DtypeError, DeviceError: at the call, for embeddings that do not fit together.

    Cost: see `tileloss.functional.paired_similarity`.

    Source: Lin, Yang and Lin 2020 (arXiv 2010.11386), section 3; the temperatures are Hinton, Vinyals and Dean 2015
    (arXiv 1503.02531).

    >>> loss = DistillKLDivLoss(model, temperature=2.0)  # doctest: +SKIP
    >>> loss([query_features, positive_features, negative_features], scores).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module | None,
        similarity_fct: SimilarityFn = pairwise_dot_score,
        temperature: float = 1.0,
        student_temperature: float | None = None,
        teacher_temperature: float | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.similarity_fct = similarity_fct
        self.temperature = temperature
        self.student_temperature = temperature if student_temperature is None else student_temperature
        self.teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
        for name in ("temperature", "student_temperature", "teacher_temperature"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise InputError(f"{name} must be a positive finite number, got {value}.")
        self.loss_fct = nn.KLDivLoss(reduction="batchmean")
        self._checked_teacher_scale = False

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor) -> Tensor:
        """The loss (0-dim) of one batch: a feature dict for each column, and the teacher's scores (B, N)."""
        columns = list(sentence_features)
        self._check_columns(columns)
        return self.compute_loss_from_embeddings(embed_columns(self.model, columns), labels)  # type: ignore[arg-type]

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss (0-dim) of embeddings (B, D) of each column, in the order query, documents."""
        self._check_columns(embeddings)
        queries, *docs = embeddings
        self._check_labels(labels, len(queries), len(docs))
        scores = paired_scores(self.similarity_fct, queries, docs)
        temperature = self.student_temperature
        if temperature != 1:  # a small batch would feel an operation that changes nothing
            scores = scores / temperature
        found = torch.log_softmax(scores, dim=1)
        wanted = torch.softmax(labels.detach() / self.teacher_temperature, dim=1)
        # once, because to look at numbers is to wait for the device, and not where a compiler cannot look
        if not (self._checked_teacher_scale or torch.compiler.is_compiling()):
            self._checked_teacher_scale = True
            _check_teacher(type(self).__name__, labels.detach(), wanted, self.teacher_temperature)
        loss = self.loss_fct(found, wanted)
        return loss if temperature == 1 else loss * temperature**2

    def _check_columns(self, columns: Sequence[Any]) -> None:
        if len(columns) < 3:
            raise ColumnsError(
                f"{type(self).__name__} expects at least 3 columns, (query, document, document, ...), but got "
                f"{len(columns)}. The softmax over a single document is constant, and there would be nothing to learn."
            )

    def _check_labels(self, labels: Tensor | None, size: int, docs: int) -> None:
        name = type(self).__name__
        if labels is None:
            raise MissingError(f"{name} needs labels: the teacher's scores of {docs} documents for each query.")
        if labels.shape != (size, docs):
            raise ShapeError(
                f"{name} expects teacher scores of shape (batch_size, N) = {(size, docs)}, one for each document "
                f"column, but got {tuple(labels.shape)}."
            )

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        config: dict[str, Any] = {
            "similarity_fct": similarity_fct_name(self.similarity_fct, PAIRED),
            "temperature": self.temperature,
        }
        own = {name: getattr(self, name) for name in ("student_temperature", "teacher_temperature")}
        return config | {name: value for name, value in own.items() if value != self.temperature}

    @property
    def citation(self) -> str:
        """BibTeX of the paper that introduced the loss."""
        return citations.LIN_2020


def _check_teacher(
    name: str,
    scores: Tensor,  # (B, N)
    probabilities: Tensor,  # (B, N)
    temperature: float,
) -> None:
    """Refuse scores that are nan, and tell of probabilities that underflow to zero."""
    scores = scores.float()
    if scores.isnan().any():
        raise InputError(
            f"{name}: the teacher scores contain NaN, and so would the loss and every gradient. Look at the column "
            "that holds them."
        )
    if scores.isinf().any():
        return  # such a score leaves a document out on purpose
    lost = int((probabilities == 0).sum())
    if lost:
        spread = float((scores.amax(dim=1) - scores.amin(dim=1)).max())
        logger.warning(
            f"{name}: at teacher_temperature={temperature}, {lost} of {probabilities.numel()} teacher probabilities "
            f"are zero by underflow, and those documents carry no gradient. The scores of one query lie up to "
            f"{spread:.1f} apart; a teacher_temperature above {spread / _UNDERFLOW:.3g} would keep them."
        )
