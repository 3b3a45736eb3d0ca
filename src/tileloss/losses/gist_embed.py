"""In-batch negatives that a guide model has looked through for false ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tileloss.errors import ShapeError
from tileloss.losses import citations
from tileloss.losses.columns import embed_columns
from tileloss.losses.guided import GuidedLoss
from tileloss.minibatches import Features


class GISTEmbedLoss(GuidedLoss):
    """In-batch softmax cross-entropy without the negatives that a guide finds more similar than the positive.

    Drop-in for sentence-transformers' class of this name: the same arguments, columns, values and gradients. The guide
    embeds the same texts; where its cosine similarity of a pair exceeds that of the anchor and its positive, less a
    margin, the pair is no candidate. Both similarities are computed in the same row blocks: nothing of batch x batch
    is stored, and nothing of batch x batch x width, which sentence-transformers' form passes through. Time is that of
    one GEMM more for each block; `tileloss.functional.contrastive_loss` states cost and sources.

    Columns are (anchor, positive) or (anchor, positive, negative); labels are ignored.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), and has a `tokenizer`.
        guide: the same for the guide; it runs without gradients. Where its vocabulary differs from the model's, or it
            takes shorter texts, the texts are decoded and tokenised again by `guide.preprocess`.
        temperature: what the cosine similarities are divided by; positive.
        margin_strategy: "absolute", the threshold is the positive's guide similarity less the margin; "relative", less
            that share of it.
        margin: with 0.0 only pairs that the guide finds more similar than the positive are left out.
        contrast_anchors: whether other anchors are candidates too.
        contrast_positives: whether other positives are candidates of a positive's row too.
        gather_across_devices: share candidates between the processes of a distributed run, but for the other
            anchors, which stay those of the process; see `tileloss.distributed`. The columns are gathered, whether
            "gather" or "ring" is asked for.

    Attributes:
        stats: `ContrastiveStats` of the last call, detached; None before the first.

    Raises:
        InputError (a ValueError): at construction, for options that are none of these, or models without tokenizers.
        ShapeError (a ValueError): at the call, for other than two or three columns.

    >>> loss = GISTEmbedLoss(model, guide)  # doctest: +SKIP
    >>> loss([anchor_features, positive_features], None).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        temperature: float = 0.01,
        margin_strategy: str = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool | str = False,
    ) -> None:
        super().__init__(
            model,
            guide,
            temperature,
            margin_strategy,
            margin,
            contrast_anchors,
            contrast_positives,
            gather_across_devices,
        )

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss (0-dim) of one batch: a feature dict for each column, in the order anchor, positive, negative."""
        columns = list(sentence_features)
        _check_columns(columns)
        guide_columns = [self.guide_features(features) for features in columns]
        embeddings = embed_columns(self.model, columns)
        with torch.no_grad():
            guide_embeddings = embed_columns(self.guide, guide_columns)
        return self.loss_of_columns(embeddings, guide_embeddings)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], guide_embeddings: Sequence[Tensor]) -> Tensor:
        """The loss (0-dim) of embeddings (B, D) of each column, and the guide's (B, G)."""
        _check_columns(embeddings)
        return self.loss_of_columns(embeddings, guide_embeddings)

    @property
    def citation(self) -> str:
        """BibTeX of the paper that introduced guided in-batch negatives."""
        return citations.SOLATORIO_2024


def _check_columns(columns: Sequence[Any]) -> None:
    if len(columns) not in (2, 3):
        raise ShapeError(
            f"Expected 2 or 3 embeddings, got {len(columns)}: columns are (anchor, positive) or (anchor, positive, "
            "negative)."
        )
