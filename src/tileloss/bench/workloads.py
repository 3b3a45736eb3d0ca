"""What is measured: loss settings under a name, and the cases (a setting at one size) that a run is made of.

tileloss and sentence-transformers give a loss the same class name and the same arguments, so one entry in `WORKLOADS`
names the work for both. A new loss is one more entry; its `plain` formula is optional and shows what a short
hand-written PyTorch version costs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 20.0
PREFIXES = (1.0, 2 / 3, 1 / 3, 1 / 6, 1 / 12)  # of 768 numbers: 768, 512, 256, 128, 64
GUIDE_WIDTH = 384  # a guide is another model, whose embeddings need not be as wide
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

# of inputs (B, D) and classes (M, D): the mean cross-entropy of their products, row i being of class i
CrossEntropy = Callable[[Tensor, Tensor], Tensor]


def _similarities(columns: Sequence[Tensor]) -> Tensor:
    """Scaled cosine of every query with every document: from columns of (B, D) to (B, (columns - 1) * B)."""
    queries, docs = columns[0], torch.cat(list(columns[1:]))
    return SCALE * F.normalize(queries, dim=-1) @ F.normalize(docs, dim=-1).T


def _in_batch(columns: Sequence[Tensor]) -> Tensor:
    logits = _similarities(columns)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def _at_prefixes(columns: Sequence[Tensor]) -> Tensor:
    dims = widths(PREFIXES, columns[0].shape[1])
    return torch.stack([_in_batch([column[:, :dim] for column in columns]) for dim in dims]).sum()


def _both_ways(columns: Sequence[Tensor]) -> Tensor:
    logits = _similarities(columns)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _softmax(columns: Sequence[Tensor], cross_entropy: CrossEntropy) -> Tensor:
    queries, docs = columns[0], torch.cat(list(columns[1:]))
    return cross_entropy(SCALE * F.normalize(queries, dim=-1), F.normalize(docs, dim=-1))


def _softmax_both_ways(columns: Sequence[Tensor], cross_entropy: CrossEntropy) -> Tensor:
    queries, docs = columns
    return (_softmax([queries, docs], cross_entropy) + _softmax([docs, queries], cross_entropy)) / 2


def _softmax_at_prefixes(columns: Sequence[Tensor], cross_entropy: CrossEntropy) -> Tensor:
    dims = widths(PREFIXES, columns[0].shape[1])
    return torch.stack([_softmax([column[:, :dim] for column in columns], cross_entropy) for dim in dims]).sum()


@dataclass(frozen=True)
class Workload:
    """One setting of one loss.

    Attributes:
        name: what it is called on the command line and in the results.
        title: what a person reads above a figure.
        loss: the class's name, in `tileloss.losses` as in sentence-transformers.
        options: the constructor's keyword arguments besides the model.
        columns: how many (B, D) embedding matrices the loss takes: queries, positives, then hard negatives.
        per_class: how many rows carry each label, for losses of classes; None for those without.
        targets: makes the labels of any other loss from the columns; it must give the same ones at every call.
        width_option: the constructor's keyword for the width of the embeddings, of a loss with a layer over them.
        guided: whether the loss takes a guide's embeddings beside the model's, and so a guide in its constructor.
        prefixes: shares of the embeddings' width at which a MatryoshkaLoss has the loss computed; none: no such loss.
        matrices: how many B x M matrices a materialised form holds at once: a guess, used until it is measured.
        plain: the same loss in a few lines of PyTorch, a function of the columns; None where nobody wrote one.
        softmax: the same loss by a given cross-entropy of products, for libraries that offer that; None if it is none.
    """

    name: str
    title: str
    loss: str = "MultipleNegativesRankingLoss"
    options: Mapping[str, Any] = field(default_factory=dict)
    columns: int = 2
    per_class: int | None = None
    targets: Callable[[Sequence[Tensor]], Any] | None = None
    width_option: str | None = None
    guided: bool = False
    prefixes: Sequence[float] = ()
    matrices: int = 5
    plain: Callable[[Sequence[Tensor]], Tensor] | None = None
    softmax: Callable[[Sequence[Tensor], CrossEntropy], Tensor] | None = None

    def labels(self, columns: Sequence[Tensor]) -> Any:
        """What the loss is given beside the columns, made once: classes in turn (B,), `targets`, or None."""
        if self.per_class is not None:
            return _classes(len(columns[0]), self.per_class, columns[0].device)
        return None if self.targets is None else _targets(self.targets, tuple(columns))

    def features(self, columns: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Feature dicts for models that hand embeddings through: of each column the model's, and a guide's."""
        queries, *docs = columns
        if not self.guided:
            return [{"sentence_embedding": own} for own in columns]
        guide = _guide_embeddings(len(queries), len(docs), queries.dtype, queries.device)
        return [
            {"sentence_embedding": own, "guide_embedding": guided} for own, guided in zip(columns, guide, strict=True)
        ]


def widths(shares: Sequence[float], width: int) -> list[int]:
    """Those shares of a width, as whole numbers."""
    return [max(round(share * width), 1) for share in shares]


@functools.cache
def _guide_embeddings(rows: int, docs: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """What a guide makes of the texts: pairs that are alike, so that it rules out a few negatives."""
    generator = torch.Generator(device).manual_seed(1)
    shape = rows, GUIDE_WIDTH
    queries, *others = (torch.randn(shape, dtype=dtype, device=device, generator=generator) for _ in range(1 + docs))
    return [queries, *(0.1 * queries + noise for noise in others)]


@functools.cache
def _classes(batch: int, per_class: int, device: torch.device) -> Tensor:
    return torch.arange(batch, device=device) % max(batch // per_class, 1)


@functools.lru_cache(maxsize=1)
def _targets(make: Callable[[Sequence[Tensor]], Any], columns: tuple[Tensor, ...]) -> Any:
    return make(columns)


def uniform(columns: Sequence[Tensor]) -> Tensor:
    """A number in [0, 1) for each row (B,), such as a graded similarity."""
    return _generated(columns, lambda generator, like: torch.rand(len(like), device=like.device, generator=generator))


def binary(columns: Sequence[Tensor]) -> Tensor:
    """0 or 1 for each row (B,)."""
    return _generated(
        columns, lambda generator, like: torch.randint(2, (len(like),), device=like.device, generator=generator)
    )


def thirds(columns: Sequence[Tensor]) -> Tensor:
    """One of three classes for each row (B,)."""
    return torch.arange(len(columns[0]), device=columns[0].device) % 3


def scores(columns: Sequence[Tensor]) -> Tensor:
    """A teacher's score of each document of a query (B, N)."""
    docs = len(columns) - 1
    return _generated(
        columns, lambda generator, like: torch.rand(len(like), docs, device=like.device, generator=generator)
    )


def teacher(columns: Sequence[Tensor]) -> list[Tensor]:
    """A teacher's embeddings for each column, (B, D) each."""
    generator = torch.Generator(columns[0].device).manual_seed(2)
    return [torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator) for x in columns]


def _generated(columns: Sequence[Tensor], make: Callable[[torch.Generator, Tensor], Tensor]) -> Tensor:
    return make(torch.Generator(columns[0].device).manual_seed(2), columns[0])


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("default", "in-batch negatives", plain=_in_batch, softmax=_softmax),
        Workload(
            "hardness",
            "in-batch negatives, hardness 9",
            options={"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
        ),
        Workload(
            "four_directions",
            "four directions, joint softmax",
            options={
                "directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
                "partition_mode": "joint",
            },
        ),
        Workload(
            "symmetric",
            "both directions, each its softmax",
            options={"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
            plain=_both_ways,
            softmax=_softmax_both_ways,
        ),
        Workload("hard_negatives", "in-batch and four hard negatives", columns=6, plain=_in_batch, softmax=_softmax),
        Workload(
            "batch_all", "all triplets, 8 of each class", "BatchAllTripletLoss", columns=1, per_class=8, matrices=48
        ),
        Workload(
            "batch_all_large_classes",
            "all triplets, 128 of each class",
            "BatchAllTripletLoss",
            columns=1,
            per_class=128,
            matrices=640,
        ),
        Workload(
            "batch_hard",
            "hardest triplets, 8 of each class",
            "BatchHardTripletLoss",
            columns=1,
            per_class=8,
            matrices=9,
        ),
        Workload(
            "semi_hard",
            "semi-hard triplets, 8 of each class",
            "BatchSemiHardTripletLoss",
            columns=1,
            per_class=8,
            matrices=18,
        ),
        Workload(
            "matryoshka",
            "in-batch negatives at five prefix widths",
            prefixes=PREFIXES,
            matrices=25,
            plain=_at_prefixes,
            softmax=_softmax_at_prefixes,
        ),
        Workload("gist", "guided in-batch negatives", "GISTEmbedLoss", guided=True, matrices=6),
        Workload(
            "tension_in_batch",
            "contrastive tension with in-batch negatives",
            "ContrastiveTensionLossInBatchNegatives",
            columns=1,
        ),
        Workload("tension", "contrastive tension", "ContrastiveTensionLoss", targets=binary, matrices=0),
        Workload(
            "mega_batch",
            "mega-batch margin",
            "MegaBatchMarginLoss",
            options={"use_mini_batched_version": False},
            matrices=3,
        ),
        Workload("cosine_similarity", "graded pairs, by cosine", "CosineSimilarityLoss", targets=uniform, matrices=0),
        Workload("contrastive", "pairs with a margin", "ContrastiveLoss", targets=binary, matrices=0),
        Workload(
            "online_contrastive", "hard pairs with a margin", "OnlineContrastiveLoss", targets=binary, matrices=0
        ),
        Workload("triplet", "given triplets", "TripletLoss", columns=3, matrices=0),
        Workload("cosent", "graded pairs, in order", "CoSENTLoss", targets=uniform, matrices=0),
        Workload("angle", "graded pairs, in order by angles", "AnglELoss", targets=uniform, matrices=0),
        Workload(
            "orthogonal",
            "two columns spread out",
            "GlobalOrthogonalRegularizationLoss",
            matrices=6,
        ),
        Workload(
            "margin_mse", "a teacher's margin of one negative", "MarginMSELoss", columns=3, targets=uniform, matrices=0
        ),
        Workload(
            "distill_kl_div",
            "a teacher's softmax over four documents",
            "DistillKLDivLoss",
            columns=5,
            targets=scores,
            matrices=0,
        ),
        Workload(
            "embed_distill",
            "a teacher's embeddings, by cosine",
            "EmbedDistillLoss",
            columns=1,
            targets=teacher,
            matrices=0,
        ),
        Workload("mse", "a teacher's embeddings, squared error", "MSELoss", columns=1, targets=teacher, matrices=0),
        Workload(
            "softmax",
            "a classifier of pairs, three classes",
            "SoftmaxLoss",
            options={"num_labels": 3},
            targets=thirds,
            width_option="embedding_dimension",
            matrices=0,
        ),
    )
}


@dataclass(frozen=True)
class Case:
    """A workload at one size: B rows per column (`batch`), D numbers per row (`width`), a dtype by name, a device."""

    workload: str
    batch: int
    width: int
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def docs(self) -> int:
        """How many rows a row is compared with: M = (columns - 1) * B documents, or the B rows of one column."""
        return max(WORKLOADS[self.workload].columns - 1, 1) * self.batch

    @property
    def group(self) -> tuple[str, int, str, str]:
        """What stays the same along one curve over the batch size."""
        return self.workload, self.width, self.dtype, self.device

    @property
    def cost(self) -> int:
        """A number that orders cases by how long they take: B * M * D * bytes per element."""
        return self.batch * self.docs * self.width * DTYPES[self.dtype].itemsize

    def embeddings(self) -> list[Tensor]:
        """Random leaves that require gradients, (B, D) each, with rows of length about one; the same at every call."""
        generator = torch.Generator(self.device).manual_seed(0)
        return [
            torch.randn(self.batch, self.width, dtype=DTYPES[self.dtype], device=self.device, generator=generator)
            .div_(math.sqrt(self.width))
            .requires_grad_()
            for _ in range(WORKLOADS[self.workload].columns)
        ]

    def __str__(self) -> str:
        return f"{self.workload} B={self.batch} D={self.width} {self.dtype}"
