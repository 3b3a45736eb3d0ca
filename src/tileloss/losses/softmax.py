"""Classifying pairs of texts by a softmax over a linear layer, as Sentence-BERT was trained on inference data."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

from tileloss.errors import InputError
from tileloss.functional.pair_classifier import are_few, logits_of_pairs
from tileloss.losses import citations
from tileloss.losses.columns import embed_columns, expect_columns
from tileloss.reference.pair_classifier import PairParts, pair_features

logger = logging.getLogger(__name__)

_Init = TypeVar("_Init", bound=Callable[..., None])
_CROSS_ENTROPY = nn.CrossEntropyLoss()


def _accepts_the_old_name(init: _Init) -> _Init:
    """Take `sentence_embedding_dimension` for `embedding_dimension`, as it used to be called, and say so."""

    @functools.wraps(init)
    def wrapper(self: nn.Module, *args: Any, **options: Any) -> None:
        if "sentence_embedding_dimension" in options:
            logger.warning("sentence_embedding_dimension is deprecated; its name is now embedding_dimension.")
            old = options.pop("sentence_embedding_dimension")
            options.setdefault("embedding_dimension", old)
        init(self, *args, **options)

    return wrapper  # type: ignore[return-value]


class SoftmaxLoss(nn.Module):
    """The class of a pair (u, v), such as entailment, from a linear layer over the features [u, v, |u - v|, u * v].

    Drop-in for sentence-transformers' class of this name: the same arguments, columns, values and gradients, without
    the concatenated features. The layer is trained with the loss and is not part of the model.
    `tileloss.functional.pair_logits` states cost and source.

    Columns are (text, other text). Labels are class indices (B,) or (B, 1), or, where num_labels > 1, probabilities
    (B, num_labels). With labels=None the call returns the embeddings and the logits (B, num_labels) instead of a loss.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer. The
            layer is made on its `device`.
        embedding_dimension: D.
        num_labels: how many classes there are.
        concatenation_sent_rep: whether u and v are among the features.
        concatenation_sent_difference: whether |u - v| is.
        concatenation_sent_multiplication: whether u * v is.
        loss_fct: makes the loss of logits (B, num_labels) and labels.

    Attributes:
        classifier: the linear layer. One with hooks, or of another kind, is given the features concatenated.

    Raises:
        InputError (a ValueError): at construction, if there would be no features.
        ColumnsError (a ShapeError and ValueError): at the call, for other than two columns.
        ShapeError, DtypeError, DeviceError: at the call, for embeddings that do not fit together or the layer.

    >>> loss = SoftmaxLoss(model, model.get_embedding_dimension(), num_labels=3)  # doctest: +SKIP
    >>> loss([premise_features, hypothesis_features], labels).backward()  # doctest: +SKIP
    """

    @_accepts_the_old_name
    def __init__(
        self,
        model: nn.Module,
        embedding_dimension: int,
        num_labels: int,
        concatenation_sent_rep: bool = True,
        concatenation_sent_difference: bool = True,
        concatenation_sent_multiplication: bool = False,
        loss_fct: Callable[[Tensor, Tensor], Tensor] = _CROSS_ENTROPY,
    ) -> None:
        super().__init__()
        self.model = model
        self.num_labels = num_labels
        self.concatenation_sent_rep = concatenation_sent_rep
        self.concatenation_sent_difference = concatenation_sent_difference
        self.concatenation_sent_multiplication = concatenation_sent_multiplication
        count = self._parts().vectors
        if count == 0:
            raise InputError(
                "At least one of concatenation_sent_rep, concatenation_sent_difference and "
                "concatenation_sent_multiplication must be True: without features there is nothing to classify."
            )
        self.classifier = nn.Linear(count * embedding_dimension, num_labels, device=getattr(model, "device", None))
        self.loss_fct = loss_fct

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None
    ) -> Tensor | tuple[list[Tensor], Tensor]:
        """The loss (0-dim) of one batch, a feature dict for each of two columns; or embeddings and logits."""
        columns = list(sentence_features)
        expect_columns(self, columns, ("text", "other text"))
        embeddings = embed_columns(self.model, columns)
        logits = self._logits(*embeddings)
        if labels is None:
            return embeddings, logits
        if self.num_labels == 1 or labels.shape != logits.shape:
            labels = labels.view(-1)
        return self.loss_fct(logits, labels)

    def _parts(self) -> PairParts:
        return PairParts(
            self.concatenation_sent_rep, self.concatenation_sent_difference, self.concatenation_sent_multiplication
        )

    def _logits(self, first: Tensor, second: Tensor) -> Tensor:
        parts, layer = self._parts(), self.classifier
        if are_few(first, second):
            try:  # to look beforehand whether everything fits takes longer than all else that is done here
                return layer(pair_features(first, second, parts))
            except RuntimeError:
                pass  # what does not fit is converted below, or refused with the reason
        if not _is_plain(layer):
            features = pair_features(first, second, parts)
            return layer(features.to(getattr(layer, "weight", features).dtype))
        return logits_of_pairs(first, second, layer.weight, layer.bias, parts)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        return {
            "num_labels": self.num_labels,
            "concatenation_sent_rep": self.concatenation_sent_rep,
            "concatenation_sent_difference": self.concatenation_sent_difference,
            "concatenation_sent_multiplication": self.concatenation_sent_multiplication,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper that introduced Sentence-BERT."""
        return citations.REIMERS_2019


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer is no more than a product with its weight, plus its bias."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer).forward is nn.Linear.forward and not hooked
