"""Ranking with in-batch negatives: the loss that most embedding models are trained with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from tileloss.distributed import check_gather
from tileloss.errors import InputError, ShapeError
from tileloss.losses import citations
from tileloss.losses.columns import embed_columns
from tileloss.losses.in_batch import InBatchLoss
from tileloss.losses.prefixes import Prefixes
from tileloss.losses.wrapping import replaced
from tileloss.similarity import cos_sim, similarity_fct_name
from tileloss.spec import DIRECTIONS, ContrastiveSpec

logger = logging.getLogger(__name__)


class MultipleNegativesRankingLoss(InBatchLoss):
    """For every query, its own document should rank first among all documents of the batch (InfoNCE).

    Drop-in for sentence-transformers' class of this name: the same arguments, columns, values and gradients, without
    the matrices of batch by batch. Memory is linear in the batch; time is that of three GEMMs.

    Columns are (query, positive[, negative_1, ..., negative_n]); labels are ignored unless `exclude_same_label` is
    set. The formula, by direction, is that of `tileloss.functional.contrastive_loss`, which also states cost and
    sources.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer.
        scale: what similarities are multiplied by, 1 / temperature; a number, or a 0-dim tensor or parameter that is
            trained along. 20 suits cosine similarity; use 1 with dot products.
        similarity_fct: one of `tileloss.similarity`'s functions, sentence-transformers' of the same name, or any
            callable (N, D), (M, D) -> (N, M). A callable of your own is materialised, unless `tileloss.rowwise`
            declares that it may run in row blocks.
        gather_across_devices: share candidates between the processes of a distributed run; see
            `tileloss.distributed`, which also says how. True leaves it to size; "gather" and "ring" ask for one way.
        directions: what a query's row of candidates holds: "query_to_doc" (always), "query_to_query", "doc_to_query",
            "doc_to_doc".
        partition_mode: "joint", one softmax over all directions, or "per_direction", one for each, averaged.
        hardness_mode: which negatives weigh more the more similar they are: None, "in_batch_negatives",
            "hard_negatives" or "all_negatives".
        hardness_strength: how much more: what their similarity is multiplied by before it is added to the logit.
        exclude_same_label: take the labels (B,) as ids: texts of rows whose labels match are no negatives of each
            other. For batches in which the same document, or the same question, occurs more than once.

    Attributes:
        stats: the `ContrastiveStats` of the last call: in-batch accuracy, mean positive and hardest-negative
            similarity. None before the first call.

    Raises:
        InputError (a ValueError): at construction, for options that are none of these.
        ShapeError, DtypeError, DeviceError: at the call, for embeddings that do not fit together.

    >>> loss = MultipleNegativesRankingLoss(model)  # doctest: +SKIP
    >>> loss([query_features, document_features], None).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float | Tensor = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool | str = False,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        exclude_same_label: bool = False,
    ) -> None:
        super().__init__()
        if not scale > 0:
            raise InputError(f"Scale must be a positive value. Got {scale!r}.")
        check_gather(gather_across_devices)
        self.model = model
        self.scale = scale
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        self.directions = directions if isinstance(directions, str) else tuple(directions or ())
        self.partition_mode = partition_mode
        self.hardness_mode = hardness_mode
        self.hardness_strength = hardness_strength
        self.exclude_same_label = exclude_same_label
        ContrastiveSpec(similarity_fct, self.directions, partition_mode, hardness_mode, hardness_strength)
        if hardness_mode is not None and hardness_strength == 0.0:
            logger.warning(
                f"hardness_mode={hardness_mode!r} has no effect with hardness_strength=0.0: give it a positive one."
            )

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss (0-dim) of one batch: a feature dict for each column, in the order query, positive, negatives."""
        return self.compute_loss_from_embeddings(embed_columns(self.model, sentence_features), labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss (0-dim) of embeddings (B, D) of each column, in the order query, positive, negatives."""
        return self._loss_of(lambda: self._inputs(embeddings, labels))

    def _inputs(self, embeddings: Sequence[Tensor], labels: Tensor | None) -> dict[str, Any]:
        """The arguments of `tileloss.functional.contrastive_loss`, the columns checked."""
        if len(embeddings) < 2:
            raise ShapeError(f"Expected at least 2 embeddings, got {len(embeddings)}: a query and a positive column.")
        queries, *docs = embeddings
        self._check_columns(queries, docs)
        return {
            "queries": queries,
            "docs": docs[0] if len(docs) == 1 else torch.cat(docs),
            "similarity": self.similarity_fct,
            "scale": self.scale,
            "directions": self.directions,
            "partition": self.partition_mode,
            "hardness": (self.hardness_mode, self.hardness_strength),
            "exclude": self._ids(labels, len(queries)) if self.exclude_same_label else None,
        }

    def at_prefixes(self, prefixes: Prefixes) -> AbstractContextManager[None] | None:
        """A block in which a call is the weighted sum over widths; see `tileloss.losses.prefixes`."""
        return None if self.gather_across_devices else replaced(self, "_prefixes", prefixes)

    def _check_columns(self, queries: Tensor, docs: Sequence[Tensor]) -> None:
        """Column by column what is later seen only as one matrix of documents."""
        if len(docs[0]) < len(queries):
            raise ShapeError(f"There are {len(queries)} queries but {len(docs[0])} positives; each needs its own.")
        widths = [column.shape[-1] for column in docs]
        if len(set(widths)) > 1:
            raise ShapeError(f"The document columns have different widths: {widths}; embed all by one model.")
        weighs_hardness = self.hardness_mode is not None and self.hardness_strength > 0
        aligned = self.exclude_same_label or weighs_hardness or "doc_to_doc" in self.directions
        sizes = [len(column) for column in docs]
        if aligned and any(size != len(queries) for size in sizes):  # a set would bind a compiled graph to them
            raise ShapeError(
                f"hardness, doc_to_doc and exclude_same_label need one document per query in every column: there are "
                f"{len(queries)} queries, and columns of {sizes} documents."
            )

    def _ids(self, labels: Tensor | None, size: int) -> Tensor:
        if labels is None:
            raise InputError("exclude_same_label=True needs labels: one integer id for each row.")
        if labels.numel() != size:
            raise ShapeError(
                f"exclude_same_label=True needs one id for each of the {size} rows, got {labels.numel()}."
            )
        return labels.view(-1)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        return {
            "scale": self.scale,
            "similarity_fct": similarity_fct_name(self.similarity_fct),
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": self.hardness_mode,
            "hardness_strength": self.hardness_strength,
        }

    @property
    def temperature(self) -> float | Tensor:
        """1 / scale."""
        return 1.0 / self.scale

    @property
    def citation(self) -> str:
        """BibTeX of the paper that introduced this choice of directions."""
        if set(self.directions) == set(DIRECTIONS) and self.partition_mode == "joint":
            return citations.LI_2023
        if set(self.directions) == {"query_to_doc", "doc_to_query"} and self.partition_mode == "per_direction":
            return citations.GUENTHER_2024
        return citations.OORD_2019
