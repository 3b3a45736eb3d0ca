"""Every loss class that is arithmetic on embeddings: the answer of its definition, or the same refusal.

AdaptiveLayerLoss and Matryoshka2dLoss, which cut a transformer off at its layers, are in `test_layers.py`, and
DenoisingAutoEncoderLoss, whose decoder reads the embeddings, in `test_denoising_auto_encoder.py`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tileloss import losses
from tileloss.paired import pairwise_cos_sim

from .judge import SUBJECT, Call, assert_definition
from .strategies import DTYPES, SIZES, WIDTHS, classes, matrices

Columns = list[Tensor]
Build = Callable[[st.DrawFn, Columns], Callable[..., Any]]


class Given(nn.Module):
    """A model whose features are the embeddings."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.width = width
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({})))

    def get_embedding_dimension(self) -> int:
        return self.width

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["rows"]}


def forward(loss: nn.Module, labels: Tensor | None = None) -> Callable[..., Any]:
    return lambda *columns: loss([{"rows": x} for x in columns], labels)


def of_embeddings(loss: Any, *labels: Any) -> Callable[..., Any]:
    return lambda *columns: loss.compute_loss_from_embeddings(list(columns), *labels)


def of_mini_batches(loss: Any, *more: Any) -> Callable[..., Any]:
    """A cached loss' own arithmetic, which its `forward` calls between two runs of the model."""

    def cut(columns: Columns) -> list[tuple[Tensor, ...]]:
        return [x.split(5) for x in columns]

    return lambda *columns: loss.calculate_loss(cut(columns), *map(cut, more))


def numbers(draw: st.DrawFn, *shape: int) -> Tensor:
    """Labels that are real numbers, with ties among them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return (torch.rand(shape, generator=generator) * 8).round() / 8


def binary(draw: st.DrawFn, columns: Columns) -> Tensor:
    return (numbers(draw, len(columns[0])) > 0.5).long()


def of_classes(loss_class: type) -> Build:
    return lambda draw, columns: of_embeddings(loss_class(Given()), draw(classes(len(columns[0]))))


def of_scores(loss_class: type) -> Build:
    return lambda draw, columns: of_embeddings(loss_class(Given()), numbers(draw, len(columns[0])))


def of_pairs(loss_class: type) -> Build:
    return lambda draw, columns: of_embeddings(loss_class(Given()), binary(draw, columns))


def unlabelled(loss_class: type, **settings: Any) -> Build:
    return lambda draw, columns: of_embeddings(loss_class(Given(), **settings))


def teacher(draw: st.DrawFn, columns: Columns) -> Tensor:
    return numbers(draw, *columns[0].shape)


def guided(draw: st.DrawFn, columns: Columns) -> Columns:
    return [numbers(draw, len(x), 4) for x in columns]


def gist(loss_class: type, call: Callable[..., Any], *settings: Any) -> Build:
    def build(draw: st.DrawFn, columns: Columns) -> Callable[..., Any]:
        return call(loss_class(Given(), Given(), *settings), guided(draw, columns))

    return build


def softmax(draw: st.DrawFn, columns: Columns) -> Callable[..., Any]:
    torch.manual_seed(0)
    loss = losses.SoftmaxLoss(Given(), columns[0].shape[1], num_labels=3).double()
    return forward(loss, torch.arange(len(columns[0])) % 3)


def matryoshka(draw: st.DrawFn, columns: Columns) -> Callable[..., Any]:
    width = columns[0].shape[1]
    dims = draw(st.lists(st.integers(1, width), min_size=1, max_size=3))
    model = Given(width)
    return forward(losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), dims))


# by class: how many columns there are, and how a draw makes a function of them
LOSSES: dict[str, tuple[int, Build]] = {
    "AnglELoss": (2, of_scores(losses.AnglELoss)),
    "BatchAllTripletLoss": (1, of_classes(losses.BatchAllTripletLoss)),
    "BatchHardSoftMarginTripletLoss": (1, of_classes(losses.BatchHardSoftMarginTripletLoss)),
    "BatchHardTripletLoss": (1, of_classes(losses.BatchHardTripletLoss)),
    "BatchSemiHardTripletLoss": (1, of_classes(losses.BatchSemiHardTripletLoss)),
    "CachedGISTEmbedLoss": (2, gist(losses.CachedGISTEmbedLoss, of_mini_batches)),
    "CachedMultipleNegativesRankingLoss": (
        3, lambda draw, columns: of_mini_batches(losses.CachedMultipleNegativesRankingLoss(Given())),
    ),
    "CachedMultipleNegativesSymmetricRankingLoss": (
        2, lambda draw, columns: of_mini_batches(losses.CachedMultipleNegativesSymmetricRankingLoss(Given())),
    ),
    "CoSENTLoss": (2, of_scores(losses.CoSENTLoss)),
    "ContrastiveLoss": (2, of_pairs(losses.ContrastiveLoss)),
    "ContrastiveTensionLoss": (
        2, lambda draw, columns: forward(losses.ContrastiveTensionLoss(Given()), binary(draw, columns)),
    ),
    "ContrastiveTensionLossInBatchNegatives": (
        1, lambda draw, columns: forward(losses.ContrastiveTensionLossInBatchNegatives(Given())),
    ),
    "CosineSimilarityLoss": (2, of_scores(losses.CosineSimilarityLoss)),
    "DistillKLDivLoss": (
        3, lambda draw, columns: of_embeddings(losses.DistillKLDivLoss(Given()), numbers(draw, len(columns[0]), 2)),
    ),
    "EmbedDistillLoss": (
        2, lambda draw, columns: of_embeddings(losses.EmbedDistillLoss(Given()), teacher(draw, columns)),
    ),
    "GISTEmbedLoss": (3, gist(losses.GISTEmbedLoss, of_embeddings)),
    "GlobalOrthogonalRegularizationLoss": (2, unlabelled(losses.GlobalOrthogonalRegularizationLoss)),
    "MSELoss": (1, lambda draw, columns: of_embeddings(losses.MSELoss(Given()), teacher(draw, columns))),
    "MarginMSELoss": (3, of_scores(losses.MarginMSELoss)),
    "MatryoshkaLoss": (2, matryoshka),
    "MegaBatchMarginLoss": (2, unlabelled(losses.MegaBatchMarginLoss)),
    "MultipleNegativesRankingLoss": (3, unlabelled(losses.MultipleNegativesRankingLoss)),
    "MultipleNegativesSymmetricRankingLoss": (2, unlabelled(losses.MultipleNegativesSymmetricRankingLoss)),
    "OnlineContrastiveLoss": (2, of_pairs(losses.OnlineContrastiveLoss)),
    "SoftmaxLoss": (2, softmax),
    "TripletLoss": (3, unlabelled(losses.TripletLoss)),
}  # fmt: skip

WITHOUT_KERNELS = {"SoftmaxLoss"}


def test_all_are_here() -> None:
    elsewhere = {"AdaptiveLayerLoss", "DenoisingAutoEncoderLoss", "Matryoshka2dLoss"}
    assert LOSSES.keys() | elsewhere == {name for name in losses.__all__ if name.endswith(("Loss", "Negatives"))}


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - (WITHOUT_KERNELS if SUBJECT == "triton" else set())))
@given(st.data(), st.booleans())
def test_the_definition(name: str, data: st.DataObject, extreme: bool) -> None:
    count, build = LOSSES[name]
    # the cosines of numbers are ties, of which these losses choose one
    size, width, dtype = data.draw(SIZES), data.draw(WIDTHS.filter(lambda width: width > 1)), data.draw(DTYPES)[0]
    # where there is no negative, the definition follows the first of numbers that were equal before one was added
    # and an angle has a kink at zero, to which the products of tiny rows underflow
    extreme = extreme and "BatchHard" not in name and name != "AnglELoss"
    columns = [data.draw(matrices(size, width, dtype, extreme)) for _ in range(count)]
    if name == "OnlineContrastiveLoss":  # chooses by comparing cosines, which had better differ by more than rounding
        cosines = pairwise_cos_sim(*(x.double() for x in columns))
        assume((cosines.sort().values.diff() > 1e-5).all())
    function = build(data.draw, columns)
    widths = range(1, width + 1) if name == "MatryoshkaLoss" else (width,)
    # what is left of the squares of extreme rows, where a loss is a difference of them, is their rounding
    finite = [x.double().nan_to_num(0.0, 0.0, 0.0).abs() for x in columns if extreme and x.numel()]
    largest = max((x.amax().item() for x in finite), default=0.0)
    assert_definition(Call(function, columns, {"loss": name}, 20.0 * (1.0 + largest**2), widths))
