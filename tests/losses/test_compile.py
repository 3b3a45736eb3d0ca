"""Losses of embeddings under torch.compile: one graph, the eager numbers, and no new graph for another batch size."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.torch_version import TorchVersion

import tileloss
from tileloss import losses

WIDTH = 8
SIZES = (12, 20, 28)  # small for every loss: the threshold where another backend is chosen lies above
# they call their model more than once, or a decoder
NOT_OF_EMBEDDINGS = {
    "AdaptiveLayerLoss", "CachedGISTEmbedLoss", "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss", "DenoisingAutoEncoderLoss", "Matryoshka2dLoss",
}  # fmt: skip


class Given(nn.Module):
    """A model of which the embeddings are known."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features

    def get_embedding_dimension(self) -> int:
        return WIDTH


@dataclass(frozen=True)
class Case:
    """How many columns a loss takes, how its labels are made from the number of rows, and its settings."""

    columns: int = 2
    labels: Callable[[int], Any] = lambda rows: None
    options: dict[str, Any] = field(default_factory=dict)


def classes(rows: int) -> Tensor:
    return torch.arange(rows) % 3


def binary(rows: int) -> Tensor:
    return torch.arange(rows) % 2


def grades(rows: int) -> Tensor:
    return torch.linspace(-1, 1, rows).sin()


def two_scores(rows: int) -> Tensor:
    return torch.linspace(-1, 1, 2 * rows).view(rows, 2)


def teacher(rows: int) -> Tensor:
    return torch.linspace(-1, 1, WIDTH * rows).view(rows, WIDTH)


ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
CASES = {
    "AnglELoss": Case(labels=grades),
    "BatchAllTripletLoss": Case(1, classes),
    "BatchHardSoftMarginTripletLoss": Case(1, classes),
    "BatchHardTripletLoss": Case(1, classes),
    "BatchSemiHardTripletLoss": Case(1, classes),
    "CoSENTLoss": Case(labels=grades),
    "ContrastiveLoss": Case(labels=binary),
    "ContrastiveTensionLoss": Case(labels=binary),
    "ContrastiveTensionLossInBatchNegatives": Case(1),
    "CosineSimilarityLoss": Case(labels=grades),
    "DistillKLDivLoss": Case(3, two_scores),
    "EmbedDistillLoss": Case(1, teacher),
    "GISTEmbedLoss": Case(2, lambda rows: [teacher(rows), teacher(rows).cos()]),
    "GlobalOrthogonalRegularizationLoss": Case(),
    "MSELoss": Case(1, teacher),
    "MarginMSELoss": Case(3, grades),
    "MatryoshkaLoss": Case(options={"matryoshka_dims": [8, 4]}),
    "MegaBatchMarginLoss": Case(options={"use_mini_batched_version": False}),
    "MultipleNegativesRankingLoss": Case(
        3, classes, {"directions": ALL, "hardness_mode": "all_negatives", "hardness_strength": 2.0,
                     "exclude_same_label": True},
    ),
    "MultipleNegativesSymmetricRankingLoss": Case(),
    "OnlineContrastiveLoss": Case(labels=binary),
    "SoftmaxLoss": Case(labels=classes, options={"embedding_dimension": WIDTH, "num_labels": 3}),
    "TripletLoss": Case(3),
}  # fmt: skip


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model, options = Given(), dict(CASES[name].options)
    if name == "MatryoshkaLoss":
        options["loss"] = losses.MultipleNegativesRankingLoss(model)
    if name == "GISTEmbedLoss":
        transformers, tokenizers = map(pytest.importorskip, ("transformers", "tokenizers"))
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        model.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
        options["guide"] = model
    return getattr(losses, name)(model, **options)


def of_embeddings(loss: nn.Module) -> Callable[[list[Tensor], Any], Any]:
    """The loss as a function of embeddings and labels."""
    method = getattr(loss, "compute_loss_from_embeddings", None)
    return method or (lambda columns, labels: loss([{"sentence_embedding": x} for x in columns], labels))


def value_and_gradients(function: Callable[..., Any], case: Case, rows: int) -> list[Tensor]:
    torch.manual_seed(rows)
    columns = [torch.randn(rows, WIDTH, requires_grad=True) for _ in range(case.columns)]
    value = function(columns, case.labels(rows))
    value = sum(value.values()) if isinstance(value, dict) else value
    return [value.detach(), *torch.autograd.grad(value, columns)]


def test_every_loss_is_here() -> None:
    everything = {name for name in losses.__all__ if issubclass(getattr(losses, name), nn.Module)}
    assert CASES.keys() | NOT_OF_EMBEDDINGS == everything


@pytest.mark.parametrize("name", CASES)
def test_one_graph_and_another_for_all_other_sizes(name: str) -> None:
    if name == "MatryoshkaLoss" and torch.__version__ < TorchVersion("2.13"):
        pytest.skip("earlier compilers cannot follow an attribute that is replaced for the length of a call")
    torch.compiler.reset()
    case, counter = CASES[name], CompileCounterWithBackend("eager")
    function = of_embeddings(made(name))
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    with tileloss.use_backend("tiled"):
        for rows in SIZES:
            expected = value_and_gradients(function, case, rows)
            for ours, eager in zip(value_and_gradients(compiled, case, rows), expected, strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2, "the first size, and then any"
