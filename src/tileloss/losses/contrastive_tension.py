"""Two copies of a model that are trained to agree on equal texts and on no others: learning from texts alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tileloss.backend import say_once
from tileloss.errors import InputError, ShapeError
from tileloss.functional import contrastive_loss, paired_similarity
from tileloss.losses import citations
from tileloss.losses.contrastive_tension_data import ContrastiveTensionDataLoader
from tileloss.losses.cross_entropy import is_plain
from tileloss.losses.named_model import NamedModelLoss
from tileloss.minibatches import Features
from tileloss.similarity import SIMILARITIES, cos_sim, recognise, rounded_as, similarity_fct_name

__all__ = ["ContrastiveTensionDataLoader", "ContrastiveTensionLoss", "ContrastiveTensionLossInBatchNegatives"]


class _TwoEncoders(NamedModelLoss):
    """A model, and a copy of it that is trained beside it and forgotten afterwards."""

    _holds_model_as = "model2"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model2 = model
        self.model1 = copy.deepcopy(model)

    @property
    def citation(self) -> str:
        """BibTeX of the paper that introduced contrastive tension."""
        return citations.CARLSSON_2021


class ContrastiveTensionLoss(_TwoEncoders):
    """Two encoders' embeddings of a pair should have a large dot product if its texts are equal, else a small one.

    Drop-in for sentence-transformers' class of this name: the same arguments, columns, values and gradients. A copy of
    the model embeds the first text of each pair, the model the second; the dot products are the logits of a binary
    cross-entropy, summed over the batch. `ContrastiveTensionDataLoader` makes suitable batches. The usual choice is
    `ContrastiveTensionLossInBatchNegatives`, which learns more from a batch.

    Columns are (text, text); labels are 1 for equal texts and 0 for others, one for each row. Without labels a row's
    is whether its token ids are the same, padding left out.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer.

    Attributes:
        model1: the copy, for the first column.
        model2: the model, for the second; it is the one to keep.
        criterion: `nn.BCEWithLogitsLoss(reduction="sum")`, called with the dot products and the labels.

    Raises:
        ShapeError (a ValueError): at the call, for other than two columns, columns of different sizes, or labels that
            are not one for each row.

    Cost: each embedding is read once forward and once backward; memory beside inputs and gradients is O(B).

    Source: Carlsson et al. 2021 (https://openreview.net/forum?id=Ov_sMNau-PF).

    >>> loss = ContrastiveTensionLoss(model)  # doctest: +SKIP
    >>> loss([first_features, second_features], labels).backward()  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.criterion = nn.BCEWithLogitsLoss(reduction="sum")

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss (0-dim) of one batch: two feature dicts, and the labels if they are known."""
        columns = list(sentence_features)
        if len(columns) != 2:
            raise ShapeError(f"ContrastiveTensionLoss expects exactly 2 columns of texts, but got {len(columns)}.")
        first, second = columns
        if labels is None:
            labels = _are_equal(first, second)
        embeddings = self.model1(first)["sentence_embedding"], self.model2(second)["sentence_embedding"]
        sizes = [len(x) for x in embeddings]
        if any(size != sizes[0] for size in (*sizes, labels.numel())):  # a set would bind a compiled graph to them
            raise ShapeError(
                f"ContrastiveTensionLoss expects two columns of one size and one label for each row, but got "
                f"{sizes[0]} and {sizes[1]} texts and labels of shape {tuple(labels.shape)}."
            )
        scores = paired_similarity(*embeddings, similarity="dot")
        loss = self.criterion(scores, labels.reshape(-1).type_as(scores))
        return rounded_as(loss, *embeddings)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them: there are none."""
        return {}


class ContrastiveTensionLossInBatchNegatives(_TwoEncoders):
    """Of all texts of a batch, a copy of the model should find most similar the one that it embeds itself.

    Drop-in for sentence-transformers' class of this name: the same arguments, columns, values and gradients, without
    the matrix of batch by batch. Model and copy embed the same texts; the loss is in-batch cross-entropy from the one
    to the other and back, averaged, with a trained scale: `tileloss.functional.contrastive_loss` with the directions
    query_to_doc and doc_to_query, each with its own softmax. It states cost and sources.

    One column of texts; further columns and labels are ignored.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer.
        scale: what similarities are multiplied by (1 / temperature) at first; a positive number.
        similarity_fct: as in `MultipleNegativesRankingLoss`.

    Attributes:
        model1: the copy.
        model2: the model; it is the one to keep.
        logit_scale: the logarithm of the scale, a trained parameter.
        cross_entropy_loss: `nn.CrossEntropyLoss()`. If replaced it is called with the matrix, materialised.

    Raises:
        InputError (a ValueError): at construction, for a scale that is not positive.
        IndexError: at the call, without a column.

    Source: Carlsson et al. 2021 (https://openreview.net/forum?id=Ov_sMNau-PF).

    >>> loss = ContrastiveTensionLossInBatchNegatives(model)  # doctest: +SKIP
    >>> loss([features], None).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
    ) -> None:
        if not scale > 0:
            raise InputError(f"Scale must be a positive value. Got {scale!r}.")
        super().__init__(model)
        self.similarity_fct = similarity_fct
        self.cross_entropy_loss = nn.CrossEntropyLoss()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, sentence_features: Sequence[Features], labels: Tensor | None = None) -> Tensor:
        """The loss (0-dim) of one batch: a list whose first feature dict is embedded by both models."""
        features = sentence_features[0]
        # one dict for both, as a wrapper around the models that tells calls apart by their dicts expects it
        first, second = (model(features)["sentence_embedding"] for model in (self.model1, self.model2))
        scale = self.logit_scale.exp()
        if not is_plain(self.cross_entropy_loss):
            return self._materialised(first, second, scale)
        return contrastive_loss(
            first,
            second,
            scale=scale,
            similarity=self.similarity_fct,
            directions=("query_to_doc", "doc_to_query"),
            partition="per_direction",
        )

    def _materialised(self, first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
        """The definition, for a cross-entropy that a user has put in place of the stock one."""
        say_once("ContrastiveTensionLossInBatchNegatives runs materialised: its cross_entropy_loss was replaced.")
        similarity = recognise(self.similarity_fct)
        measure = SIMILARITIES[similarity] if isinstance(similarity, str) else similarity
        scores = measure(first, second) * scale
        own = torch.arange(len(scores), device=scores.device)
        return (self.cross_entropy_loss(scores, own) + self.cross_entropy_loss(scores.T, own)) / 2

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them, with the scale as it is now."""
        return {"scale": self.logit_scale.exp().item(), "similarity_fct": similarity_fct_name(self.similarity_fct)}


def _are_equal(first: Features, second: Features) -> Tensor:  # (B,) boolean
    """Whether the texts of two columns have the same token ids, row by row, wherever padding stands."""
    columns = (first, second)
    if any("input_ids" not in features for features in columns):
        raise KeyError("Without labels, ContrastiveTensionLoss compares 'input_ids', which these features lack.")
    ids: list[Tensor] = [features["input_ids"] for features in columns]
    masks = [mask.bool() for features in columns if (mask := features.get("attention_mask")) is not None]
    if len(ids[0]) != len(ids[1]):
        raise ShapeError(f"There are {len(ids[0])} texts in the first column and {len(ids[1])} in the second.")
    if len(masks) == 2:
        width = max(x.shape[1] for x in ids)
        ids = [_without_padding(x, mask, width) for x, mask in zip(ids, masks, strict=True)]
    elif ids[0].shape != ids[1].shape:
        raise ShapeError(
            f"Token ids of shapes {tuple(ids[0].shape)} and {tuple(ids[1].shape)} cannot be compared without an "
            "'attention_mask' in both columns that says what is padding. Give labels."
        )
    return torch.eq(*ids).all(dim=1)


def _without_padding(
    ids: Tensor,  # (B, W)
    mask: Tensor,  # (B, W) boolean
    width: int,
) -> Tensor:  # (B, width)
    """Each row's tokens at its beginning, and behind them -1, which is no token."""
    # padding goes to one more column, which is cut off; nothing waits for the device to count
    place = (mask.cumsum(dim=1) - 1).masked_fill(~mask, width)
    return ids.new_full((len(ids), width + 1), -1).scatter(1, place, ids)[:, :width]
