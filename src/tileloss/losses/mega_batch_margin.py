"""Margins for each positive and for the hardest negative of a large batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tileloss.errors import InputError, ShapeError
from tileloss.functional import hardest_negatives
from tileloss.gradcache import GradCache, backward_by_columns
from tileloss.losses import citations
from tileloss.losses.columns import embed_columns
from tileloss.losses.static_embeddings import reads_static_embeddings
from tileloss.minibatches import check_mini_batch_num_tokens


class MegaBatchMarginLoss(GradCache):
    """A pair should be more similar than one margin, an anchor and its hardest negative less than another.

    Drop-in for sentence-transformers' class of this name: the same arguments, columns, values and gradients, without
    the matrix of batch by batch. The hardest negative of an anchor is the most similar among the positives of all
    other anchors, by cosine; the loss is the mean over anchors of relu(positive_margin - positive similarity) +
    relu(similarity of the hardest negative - negative_margin). Memory is linear in the batch; time is that of one
    GEMM. `tileloss.functional.hardest_negatives` states cost and source.

    Columns are (anchor, positive), of which more positives than anchors are further negatives; labels are ignored.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer.
        positive_margin: what the similarity of a pair should exceed.
        negative_margin: what the similarity of an anchor with its hardest negative should stay below.
        use_mini_batched_version: embed in mini-batches, with a gradient cache (see `tileloss.gradcache`): the same
            value and gradients in the activation memory of one mini-batch, for a second forward pass of the model.
            The returned loss is then a leaf tensor, whose `backward()` is the only way to the parameters.
        mini_batch_size: texts that are embedded at a time. It does not bound the memory of the loss itself, which is
            linear in the batch without any setting.
        mini_batch_num_tokens: if set, embed as many texts at a time as have this many tokens, padding not counted.
        show_progress_bar: show the progress of the embedding, by tqdm.

    Attributes:
        uses_gradient_cache: whether this is the mini-batched version.

    Raises:
        InputError (a ValueError): at construction, for options that are none of these, or for the mini-batched
            version of a model with static embeddings; at the call, for a mini-batch without rows.
        ShapeError: at the call, for other than two columns, or an empty batch.
        ShapeError, DtypeError, DeviceError: at the call, for embeddings that do not fit together.

    >>> loss = MegaBatchMarginLoss(model, mini_batch_size=64)  # doctest: +SKIP
    >>> loss([anchor_features, positive_features], None).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        positive_margin: float = 0.8,
        negative_margin: float = 0.3,
        use_mini_batched_version: bool = True,
        mini_batch_size: int = 50,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
    ) -> None:
        super().__init__()
        if use_mini_batched_version and reads_static_embeddings(model):
            raise InputError(
                "The mini-batched MegaBatchMarginLoss is not compatible with a SentenceTransformer model based on a "
                "StaticEmbedding, whose inputs have no row for each text to cut mini-batches from. Pass "
                "use_mini_batched_version=False, which such a model leaves room enough for."
            )
        check_mini_batch_num_tokens(mini_batch_num_tokens)
        self.model = model
        self.positive_margin = positive_margin
        self.negative_margin = negative_margin
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar
        self.uses_gradient_cache = use_mini_batched_version

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss (0-dim) of one batch: a feature dict for each column, in the order anchor, positive."""
        run = self.forward_mini_batched if self.uses_gradient_cache else self.forward_non_mini_batched
        return run(sentence_features, labels)

    def forward_mini_batched(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """As `forward`, by the gradient cache."""
        columns = list(sentence_features)
        _check_columns(columns)  # before anything is embedded
        return self.forward_cached(columns, labels)

    def forward_non_mini_batched(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """As `forward`, in one pass of the model for each column."""
        columns = list(sentence_features)
        _check_columns(columns)
        return self.compute_loss_from_embeddings(embed_columns(self.model, columns), labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss (0-dim) of embeddings (B, D) of each column, in the order anchor, positive."""
        _check_columns(embeddings)
        anchors, positives = embeddings
        if len(anchors) == 0:
            raise ShapeError("MegaBatchMarginLoss needs at least one pair, got an empty batch.")
        hardest = hardest_negatives(anchors, positives, similarity="cosine")
        missed = F.relu(self.positive_margin - hardest.positive_similarity)
        return (missed + F.relu(hardest.similarity - self.negative_margin)).mean()

    def calculate_loss(
        self,
        reps: Sequence[Sequence[Tensor]],  # of each column the embeddings of its mini-batches
        labels: Tensor | None = None,
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """The loss (0-dim) of embeddings in mini-batches; `with_backward` back-propagates and detaches it."""
        return backward_by_columns(
            lambda columns: self.compute_loss_from_embeddings(columns, labels), reps, with_backward
        )

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        return {
            "positive_margin": self.positive_margin,
            "negative_margin": self.negative_margin,
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper that introduced mega-batching."""
        return citations.WIETING_2018


def _check_columns(columns: Sequence[Any]) -> None:
    if len(columns) != 2:
        raise ShapeError(
            f"MegaBatchMarginLoss expects exactly 2 input columns, (anchor, positive), but got {len(columns)}. The "
            "positives of other anchors are its negatives; MultipleNegativesRankingLoss takes columns of negatives."
        )
