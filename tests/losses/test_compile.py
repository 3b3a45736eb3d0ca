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


class Encoder(nn.Module):
    """The mean of token vectors, for a loss of whole columns of text."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(50, WIDTH)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        mask = features["attention_mask"][..., None]
        mean = (self.tokens(features["input_ids"]) * mask).sum(dim=1) / mask.sum(dim=1)
        return {**features, "sentence_embedding": mean}


def text(rows: int, width: int) -> dict[str, Tensor]:
    ids = torch.randint(50, (rows, width))
    return {"input_ids": ids, "attention_mask": (torch.arange(width) < torch.randint(1, width, (rows, 1))).long()}


# more columns than two, by the loss that takes them and how many there are
MANY_COLUMNS = {
    ("DistillKLDivLoss", 3): two_scores,
    ("DistillKLDivLoss", 5): lambda rows: torch.linspace(-1, 1, 4 * rows).view(rows, 4),
    ("MarginMSELoss", 3): grades,
    ("MarginMSELoss", 5): lambda rows: torch.linspace(-1, 1, 3 * rows).view(rows, 3),
    ("MultipleNegativesRankingLoss", 3): lambda rows: None,
    ("MultipleNegativesRankingLoss", 5): lambda rows: None,
    ("TripletLoss", 3): lambda rows: None,
}


@pytest.mark.parametrize(("name", "columns"), MANY_COLUMNS)
@pytest.mark.parametrize("of_text", [False, True], ids=["embeddings", "text"])
def test_a_forward_of_many_columns_is_one_graph(name: str, columns: int, of_text: bool) -> None:
    """Eagerly, the columns after the first share a forward pass of the model; in a graph each has its own."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    loss = getattr(losses, name)(Encoder() if of_text else Given())
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    with tileloss.use_backend("tiled"):
        for rows in SIZES:
            torch.manual_seed(rows)
            labels = MANY_COLUMNS[name, columns](rows)
            if of_text:  # documents of another width than queries, and of one that changes from batch to batch
                batch = [text(rows, 5 + rows * (place > 0)) for place in range(columns)]
                inputs = [loss.model.tokens.weight]
            else:
                inputs = [torch.randn(rows, WIDTH, requires_grad=True) for _ in range(columns)]
                batch = [{"sentence_embedding": x} for x in inputs]
            found, expected = (stepped(function, batch, labels, inputs) for function in (compiled, loss))
            for ours, eager in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2, "the first size, and then any"


def stepped(
    loss: Callable[..., Any], batch: list[dict[str, Tensor]], labels: Tensor | None, inputs: list[Tensor]
) -> list[Tensor]:
    """The value and the gradients of one call, which leaves the batch as it was."""
    value = loss([dict(features) for features in batch], labels)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def test_every_loss_is_here() -> None:
    everything = {name for name in losses.__all__ if issubclass(getattr(losses, name), nn.Module)}
    assert CASES.keys() | NOT_OF_EMBEDDINGS == everything


# TripletLoss is called for each width, the others have one pass for all
@pytest.mark.parametrize("name", ["CoSENTLoss", "CosineSimilarityLoss", "TripletLoss"])
def test_prefixes_of_every_inner_loss_are_one_graph(name: str) -> None:
    if name == "TripletLoss" and torch.__version__ < TorchVersion("2.13"):
        pytest.skip("earlier compilers cannot follow a forward that is replaced for the length of a call")
    torch.compiler.reset()
    case, counter, inner = CASES[name], CompileCounterWithBackend("eager"), made(name)
    loss = losses.MatryoshkaLoss(inner.model, inner, [8, 4, 2])
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    before = set(vars(inner)), set(vars(inner.model))
    for rows in SIZES:
        batch = [{"sentence_embedding": torch.randn(rows, WIDTH, requires_grad=True)} for _ in range(case.columns)]
        inputs = [features["sentence_embedding"] for features in batch]
        found, expected = (stepped(function, batch, case.labels(rows), inputs) for function in (compiled, loss))
        for ours, eager in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2, "the first size, and then any"
    assert (set(vars(inner)), set(vars(inner.model))) == before, "nothing is left replaced"


@pytest.mark.parametrize("name", CASES)
def test_one_graph_and_another_for_all_other_sizes(name: str) -> None:
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
