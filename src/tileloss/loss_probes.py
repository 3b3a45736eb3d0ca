"""Every loss, called once with embeddings that are given: to see what it would run, without a model.

Constructor arguments are the defaults where there are any, since those are what most people train with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tileloss import losses
from tileloss.given import Given

WIDTH = 384  # of the embeddings


@dataclass(frozen=True)
class LossProbe:
    """How a loss is made, and what it is given.

    Attributes:
        options: the constructor's keyword arguments beside the model.
        columns: how many texts a row has.
        labels: makes the labels, from the first column's embeddings.
        around: the class of the loss that goes in as `loss`, if any.
        guided: whether another model goes in as `guide`.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    columns: int = 2
    labels: Callable[[Tensor], Tensor | None] = lambda x: None
    around: str | None = None
    guided: bool = False


def _classes(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) % max(len(x) // 8, 2)


def _binary(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) % 2


def _grades(x: Tensor) -> Tensor:
    return torch.linspace(0, 1, len(x), dtype=x.dtype, device=x.device)


def _teacher(x: Tensor) -> Tensor:
    return x.flip(0)


def _two_scores(x: Tensor) -> Tensor:
    return torch.stack([_grades(x), 1 - _grades(x)], dim=1)


PROBES = {
    "AnglELoss": LossProbe(labels=_grades),
    "BatchAllTripletLoss": LossProbe(columns=1, labels=_classes),
    "BatchHardSoftMarginTripletLoss": LossProbe(columns=1, labels=_classes),
    "BatchHardTripletLoss": LossProbe(columns=1, labels=_classes),
    "BatchSemiHardTripletLoss": LossProbe(columns=1, labels=_classes),
    "CachedGISTEmbedLoss": LossProbe(guided=True),
    "CachedMultipleNegativesRankingLoss": LossProbe(),
    "CachedMultipleNegativesSymmetricRankingLoss": LossProbe(),
    "CoSENTLoss": LossProbe(labels=_grades),
    "ContrastiveLoss": LossProbe(labels=_binary),
    "ContrastiveTensionLoss": LossProbe(labels=_binary),
    "ContrastiveTensionLossInBatchNegatives": LossProbe(columns=1),
    "CosineSimilarityLoss": LossProbe(labels=_grades),
    "DistillKLDivLoss": LossProbe(columns=3, labels=_two_scores),
    "EmbedDistillLoss": LossProbe(columns=1, labels=_teacher),
    "GISTEmbedLoss": LossProbe(guided=True),
    "GlobalOrthogonalRegularizationLoss": LossProbe(),
    "MSELoss": LossProbe(columns=1, labels=_teacher),
    "MarginMSELoss": LossProbe(columns=3, labels=_grades),
    "MatryoshkaLoss": LossProbe({"matryoshka_dims": [WIDTH, 128, 64]}, around="MultipleNegativesRankingLoss"),
    "MegaBatchMarginLoss": LossProbe(),
    "MultipleNegativesRankingLoss": LossProbe(),
    "MultipleNegativesSymmetricRankingLoss": LossProbe(),
    "OnlineContrastiveLoss": LossProbe(labels=_binary),
    "SoftmaxLoss": LossProbe({"embedding_dimension": WIDTH, "num_labels": 3}, labels=_binary),
    "TripletLoss": LossProbe(columns=3),
}
# what cannot be called with embeddings, and what runs there
ELSEWHERE = {
    "AdaptiveLayerLoss": "that of the loss inside, for every layer",
    "DenoisingAutoEncoderLoss": "none of ours: its time is its decoder's",
    "Matryoshka2dLoss": "that of the loss inside, for every layer, at every width as MatryoshkaLoss",
}


def call(name: str, rows: int, device: torch.device) -> None:
    """Call a loss of `PROBES` once, in float32, without gradients.

    Raises:
        ImportError: for a guided loss without transformers, whose tokenizers such a loss compares.
    """
    probe, model = PROBES[name], Given()
    options = dict(probe.options)
    if probe.around:
        options["loss"] = getattr(losses, probe.around)(model)
    if probe.guided:
        options["guide"] = Given()
    loss: nn.Module = getattr(losses, name)(model, **options).to(device)
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randn(rows, WIDTH, generator=generator).to(device) for _ in range(probe.columns)]
    with torch.no_grad():
        loss([{"sentence_embedding": column} for column in columns], probe.labels(columns[0]))
