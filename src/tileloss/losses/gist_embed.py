"""In-batch negatives that a guide model has looked through for false ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tileloss.backend import say_once
from tileloss.errors import InputError, ShapeError
from tileloss.functional.contrastive import ContrastiveStats, contrastive_loss_with_stats
from tileloss.guide import STRATEGIES, Guide, thresholds
from tileloss.losses import citations
from tileloss.losses.columns import Features, embed_columns
from tileloss.losses.multiple_negatives_ranking import check_single_process
from tileloss.losses.retokenize import check_tokenizers, must_retokenize, retokenized


class GISTEmbedLoss(nn.Module):
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
        gather_across_devices: not available with several processes yet.

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
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__()
        if margin_strategy not in STRATEGIES:
            raise InputError(f"margin_strategy must be 'absolute' or 'relative', got {margin_strategy!r}.")
        if not temperature > 0:
            raise InputError(f"temperature must be a positive number, got {temperature!r}.")
        check_tokenizers(model, guide)
        self.model = model
        self.guide = guide
        self.temperature = temperature
        self.similarity_fct = nn.CosineSimilarity(dim=-1)
        self.must_retokenize = must_retokenize(model, guide)
        if self.must_retokenize:
            self.tokenizer = model.tokenizer
        self.margin_strategy = margin_strategy
        self.margin = margin
        self.contrast_anchors = contrast_anchors
        self.contrast_positives = contrast_positives
        self.gather_across_devices = gather_across_devices
        self.cross_entropy_loss = nn.CrossEntropyLoss()
        self.stats: ContrastiveStats | None = None

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss (0-dim) of one batch: a feature dict for each column, in the order anchor, positive, negative."""
        columns = list(sentence_features)
        _check_columns(columns)
        # before the model runs: it writes its outputs into the features it is given, and so would the guide
        guide_columns = [dict(features) for features in columns]
        embeddings = embed_columns(self.model, columns)
        with torch.no_grad():
            if self.must_retokenize:
                guide_columns = [retokenized(features, self.tokenizer, self.guide) for features in columns]
            guide_embeddings = embed_columns(self.guide, guide_columns)
        return self.compute_loss_from_embeddings(embeddings, guide_embeddings)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], guide_embeddings: Sequence[Tensor]) -> Tensor:
        """The loss (0-dim) of embeddings (B, D) of each column, and the guide's (B, G)."""
        _check_columns(embeddings)
        if self.gather_across_devices:
            check_single_process()
        if not self._is_stock():
            return self._materialised(embeddings, guide_embeddings)
        anchors, positives, *negatives = embeddings
        guide_anchors, guide_positives, *guide_negatives = guide_embeddings
        if len(positives) != len(anchors):
            raise ShapeError(f"There are {len(anchors)} anchors but {len(positives)} positives; each needs its own.")
        loss, self.stats = contrastive_loss_with_stats(
            anchors,
            torch.cat([positives, *negatives]) if negatives else positives,
            scale=1.0 / self.temperature,
            similarity="torch_cosine",
            directions=self._directions(),
            exclude=Guide(
                guide_anchors,
                torch.cat([guide_positives, *guide_negatives]) if guide_negatives else guide_positives,
                self.margin,
                self.margin_strategy,
            ),
        )
        return loss.to(anchors.dtype)

    def _directions(self) -> list[str]:
        sides = {"query_to_query": self.contrast_anchors, "doc_to_doc": self.contrast_positives}
        return ["query_to_doc", *(name for name, wanted in sides.items() if wanted)]

    def _is_stock(self) -> bool:
        """Whether similarity and cross-entropy are those that the block algorithm computes."""
        similarity, entropy = self.similarity_fct, self.cross_entropy_loss
        if type(similarity) is not nn.CosineSimilarity or type(entropy) is not nn.CrossEntropyLoss:
            return False
        settings = (similarity.dim, similarity.eps, entropy.weight, entropy.reduction, entropy.label_smoothing)
        return settings == (-1, 1e-8, None, "mean", 0.0)

    def sim_matrix(
        self,
        embed1: Tensor,  # (N, D)
        embed2: Tensor,  # (M, D)
    ) -> Tensor:  # (N, M)
        """All similarities by `similarity_fct`, in N x M x D memory; the loss itself does without."""
        return self.similarity_fct(embed1.unsqueeze(1), embed2.unsqueeze(0))

    def _materialised(self, embeddings: Sequence[Tensor], guide_embeddings: Sequence[Tensor]) -> Tensor:
        """The definition, for a similarity or a cross-entropy that a user has put in place of the stock ones."""
        say_once("GISTEmbedLoss runs materialised: its similarity_fct or cross_entropy_loss was replaced.")
        pairs = [(0, 1)]  # of columns
        pairs += [(0, 0)] if self.contrast_anchors else []
        pairs += [(1, 1)] if self.contrast_positives else []
        pairs += [(0, 2)] if len(embeddings) == 3 else []
        limit: Tensor | None = None
        logits = []
        for left, right in pairs:
            guided = self.sim_matrix(guide_embeddings[left], guide_embeddings[right])
            if limit is None:  # the first pair is that of anchors and positives
                limit = thresholds(guided.diagonal(), self.margin, self.margin_strategy)[:, None]
                excluded = (guided > limit).fill_diagonal_(False)
            else:
                excluded = guided > limit
            logits.append(self.sim_matrix(embeddings[left], embeddings[right]).masked_fill(excluded, float("-inf")))
        targets = torch.arange(len(embeddings[0]), device=embeddings[0].device)
        return self.cross_entropy_loss(torch.cat(logits, dim=1) / self.temperature, targets)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        return {
            "guide": self.guide,
            "temperature": self.temperature,
            "margin_strategy": self.margin_strategy,
            "margin": self.margin,
            "contrast_anchors": self.contrast_anchors,
            "contrast_positives": self.contrast_positives,
            "gather_across_devices": self.gather_across_devices,
        }

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
