"""What the losses with a guide have in common: their settings, and the loss of embeddings that both models made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tileloss.backend import say_once
from tileloss.distributed import check_gather, part_of_batch
from tileloss.errors import InputError, ShapeError
from tileloss.guide import STRATEGIES, Guide, thresholds
from tileloss.losses.cross_entropy import is_plain
from tileloss.losses.in_batch import InBatchLoss
from tileloss.losses.prefixes import Prefixes
from tileloss.losses.retokenize import check_tokenizers, must_retokenize, retokenized
from tileloss.losses.wrapping import replaced
from tileloss.minibatches import Features
from tileloss.similarity import rounded_as
from tileloss.tiled.part import Part


class Columns(NamedTuple):
    """Anchors, positives and negatives, by the model (B, D) each and by its guide (B, G) each."""

    embeddings: Sequence[Tensor]
    by_guide: Sequence[Tensor]

    def rows(self, begin: int, end: int) -> Columns:
        """Some rows of each column."""
        return Columns([x[begin:end] for x in self.embeddings], [x[begin:end] for x in self.by_guide])


class GuidedLoss(InBatchLoss):
    """In-batch softmax cross-entropy without the negatives that a guide finds more similar than the positive.

    Subclasses embed the columns by both models and call `loss_of_columns`.
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        temperature: float,
        margin_strategy: str,
        margin: float,
        contrast_anchors: bool,
        contrast_positives: bool,
        gather_across_devices: bool | str,
    ) -> None:
        super().__init__()
        if margin_strategy not in STRATEGIES:
            raise InputError(f"margin_strategy must be 'absolute' or 'relative', got {margin_strategy!r}.")
        if not temperature > 0:
            raise InputError(f"temperature must be a positive number, got {temperature!r}.")
        check_gather(gather_across_devices)
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

    def guide_features(self, features: Features) -> Features:
        """What the guide is given for a column or mini-batch, made before the model writes its outputs into it."""
        return retokenized(features, self.tokenizer, self.guide) if self.must_retokenize else dict(features)

    def loss_of_columns(
        self,
        embeddings: Sequence[Tensor],  # anchors, positives, negatives: (B, D) each
        guide_embeddings: Sequence[Tensor],  # the same texts by the guide: (B, G) each
    ) -> Tensor:
        """The loss (0-dim), in the embeddings' dtype."""

        def inputs() -> dict[str, Any]:
            return self._inputs(embeddings, guide_embeddings)

        if not self._is_stock():
            say_once(
                f"{type(self).__name__} runs materialised: its similarity_fct or cross_entropy_loss was replaced."
            )
            part = part_of_batch(inputs, self.gather_across_devices)
            return self._loss_of_part(embeddings, guide_embeddings, part)
        return rounded_as(self._loss_of(inputs), embeddings[0])

    def _inputs(self, embeddings: Sequence[Tensor], guide_embeddings: Sequence[Tensor]) -> dict[str, Any]:
        """The arguments of `tileloss.functional.contrastive_loss`, the columns checked."""
        _check_positives(embeddings)
        anchors, *docs = embeddings
        guide_anchors, *guide_docs = guide_embeddings
        return {
            "queries": anchors,
            "docs": docs[0] if len(docs) == 1 else torch.cat(docs),
            "similarity": "torch_cosine",
            "scale": 1.0 / self.temperature,
            "directions": self._directions(),
            "exclude": Guide(
                guide_anchors,
                guide_docs[0] if len(guide_docs) == 1 else torch.cat(guide_docs),
                self.margin,
                self.margin_strategy,
            ),
        }

    def at_prefixes(self, prefixes: Prefixes) -> AbstractContextManager[None] | None:
        """A block in which a call is the weighted sum over widths; see `tileloss.losses.prefixes`."""
        # a guide that is the model itself is cut along with it
        if self.gather_across_devices or not self._is_stock() or self.guide is self.model:
            return None
        return replaced(self, "_prefixes", prefixes)

    def _directions(self) -> list[str]:
        sides = {"query_to_query": self.contrast_anchors, "doc_to_doc": self.contrast_positives}
        return ["query_to_doc", *(name for name, wanted in sides.items() if wanted)]

    def _is_stock(self) -> bool:
        """Whether similarity and cross-entropy are those that the block algorithm computes."""
        similarity = self.similarity_fct
        stock = type(similarity) is nn.CosineSimilarity and (similarity.dim, similarity.eps) == (-1, 1e-8)
        return stock and is_plain(self.cross_entropy_loss)

    def sim_matrix(
        self,
        embed1: Tensor,  # (N, D)
        embed2: Tensor,  # (M, D)
    ) -> Tensor:  # (N, M)
        """All similarities by `similarity_fct`, in N x M x D memory; the loss itself does without."""
        return self.similarity_fct(embed1.unsqueeze(1), embed2.unsqueeze(0))

    def _loss_of_part(self, embeddings: Sequence[Tensor], guide_embeddings: Sequence[Tensor], part: Part) -> Tensor:
        """The loss (0-dim) with a similarity or a cross-entropy that a user has put in place of the stock ones.

        Of these rows, as their share of the batch's mean, times the number of processes.
        """
        candidates = Columns(
            # anchors stay in their process, as with sentence-transformers
            [embeddings[0], *map(part.gathered_with_grad, embeddings[1:])],
            [guide_embeddings[0], *map(part.gathered, guide_embeddings[1:])],
        )
        loss = self._materialised(Columns(embeddings, guide_embeddings), candidates, part.first)
        return loss if part.is_whole else loss * (part.count * part.processes / part.size)

    def _materialised(self, rows: Columns, candidates: Columns, first: int) -> Tensor:
        """The mean loss (0-dim) of rows, of which the first has candidate `first` as its positive, and so on."""
        return self._definition(rows, candidates, first)

    def _definition(self, rows: Columns, candidates: Columns, first: int) -> Tensor:
        """As `_materialised`, at once."""
        limit: Tensor | None = None
        logits = []
        anchors = rows.embeddings[0]
        own = torch.arange(first, first + len(anchors), device=anchors.device)[:, None]
        for left, right in self._pairs(len(rows.embeddings)):
            guided = self.sim_matrix(rows.by_guide[left], candidates.by_guide[right])
            if limit is None:  # the first pair is that of anchors and positives
                limit = thresholds(guided.gather(1, own), self.margin, self.margin_strategy)
                excluded = (guided > limit).scatter(1, own, False)
            else:
                excluded = guided > limit
            similarities = self.sim_matrix(rows.embeddings[left], candidates.embeddings[right])
            logits.append(similarities.masked_fill(excluded, float("-inf")))
        return self.cross_entropy_loss(torch.cat(logits, dim=1) / self.temperature, own[:, 0])

    def _pairs(self, columns: int) -> Iterator[tuple[int, int]]:
        """The columns that are compared with each other, in the order of the logits."""
        yield 0, 1
        if self.contrast_anchors:
            yield 0, 0
        if self.contrast_positives:
            yield 1, 1
        yield from ((0, negatives) for negatives in range(2, columns))

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


def _check_positives(embeddings: Sequence[Tensor]) -> None:
    anchors, positives = embeddings[:2]
    if len(positives) != len(anchors):
        raise ShapeError(f"There are {len(anchors)} anchors but {len(positives)} positives; each needs its own.")
