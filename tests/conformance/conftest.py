"""One way to make each loss, of sentence-transformers' class or of ours, and a batch that it takes."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tileloss import losses

WIDTH = 16  # of the tiny encoder's embeddings
ROWS = 6


@dataclass(frozen=True)
class Case:
    """How a loss is made, and what it is given.

    Attributes:
        options: the constructor's keyword arguments beside the model.
        columns: how many texts a row has.
        labels: makes the labels.
        around: the name of the class of a loss that goes in as `loss`, if any.
        guided: whether another model goes in as `guide`.
        static: whether it also trains a bag of words, whose features have no row for each text.
    """

    options: dict[str, Any] = field(default_factory=dict)
    columns: int = 2
    labels: Callable[[], Tensor | None] = lambda: None
    around: str | None = None
    guided: bool = False
    static: bool = True


def _classes() -> Tensor:
    return torch.arange(ROWS) % 2


def _grades() -> Tensor:
    return torch.linspace(0, 1, ROWS, dtype=torch.float64)


def _teacher(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


_CACHED = {"mini_batch_size": 4}
_DIMS = {"matryoshka_dims": [8, 16, 4], "matryoshka_weights": [2.0, 1.0, 0.5]}

CASES = {
    "AdaptiveLayerLoss": Case({"n_layers_per_step": -1}, around="MultipleNegativesRankingLoss", static=False),
    "AnglELoss": Case({"scale": 10.0}, labels=_grades),
    "BatchAllTripletLoss": Case({"margin": 0.5}, 1, _classes),
    "BatchHardSoftMarginTripletLoss": Case({}, 1, _classes),
    "BatchHardTripletLoss": Case({"margin": 0.5}, 1, _classes),
    "BatchSemiHardTripletLoss": Case({"margin": 0.5}, 1, _classes),
    "CachedGISTEmbedLoss": Case({"temperature": 0.1, **_CACHED}, 3, guided=True, static=False),
    "CachedMultipleNegativesRankingLoss": Case({"scale": 10.0, **_CACHED}, 3, static=False),
    "CachedMultipleNegativesSymmetricRankingLoss": Case({"scale": 10.0, **_CACHED}, static=False),
    "CoSENTLoss": Case({"scale": 10.0}, labels=_grades),
    "ContrastiveLoss": Case({"margin": 0.9, "size_average": False}, labels=_classes),
    "ContrastiveTensionLoss": Case(labels=_classes),
    "ContrastiveTensionLossInBatchNegatives": Case({"scale": 10.0}, 1),
    "CosineSimilarityLoss": Case({"cos_score_transformation": nn.Sigmoid()}, labels=_grades),
    "DenoisingAutoEncoderLoss": Case(static=False),
    "DistillKLDivLoss": Case({"temperature": 2.0, "teacher_temperature": 3.0}, 4, _teacher(ROWS, 3)),
    "EmbedDistillLoss": Case({"projection_dim": 5}, labels=_teacher(ROWS, 5)),
    "GISTEmbedLoss": Case({"temperature": 0.1, "margin": 0.05}, 3, guided=True),
    "GlobalOrthogonalRegularizationLoss": Case({"mean_weight": 2.0}),
    "MSELoss": Case({"projection_dim": 5}, labels=_teacher(ROWS, 5)),
    "MarginMSELoss": Case({}, 3, _teacher(ROWS)),
    "Matryoshka2dLoss": Case(
        {"n_layers_per_step": -1, "n_dims_per_step": -1, **_DIMS}, around="MultipleNegativesRankingLoss", static=False
    ),
    "MatryoshkaLoss": Case(_DIMS, around="MultipleNegativesRankingLoss"),
    "MegaBatchMarginLoss": Case({"positive_margin": 0.9, "mini_batch_size": 4}, static=False),
    "MultipleNegativesRankingLoss": Case({"scale": 10.0, "partition_mode": "joint"}, 3),
    "MultipleNegativesSymmetricRankingLoss": Case({"scale": 10.0}),
    "OnlineContrastiveLoss": Case({"margin": 0.9}, labels=_classes),
    "SoftmaxLoss": Case(
        {"embedding_dimension": WIDTH, "num_labels": 2, "concatenation_sent_multiplication": True}, labels=_classes
    ),
    "TripletLoss": Case({"triplet_margin": 0.5}, 3),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for a `name` runs once for each loss that both libraries have."""
    if "name" in metafunc.fixturenames:
        stock = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
        both = [name for name in losses.__all__ if name in stock.__all__]
        metafunc.parametrize("name", [name for name in both if issubclass(getattr(losses, name), nn.Module)])


@pytest.fixture(scope="session")
def stock() -> ModuleType:
    """sentence-transformers' own losses."""
    return pytest.importorskip("sentence_transformers.sentence_transformer.losses")


@pytest.fixture(params=["theirs", "ours"])
def library(request: pytest.FixtureRequest, stock: ModuleType) -> ModuleType:
    """The losses of sentence-transformers, then ours."""
    return stock if request.param == "theirs" else losses


@pytest.fixture
def make(tiny_encoder: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a loss of a library by its class's name, around a tiny encoder in double precision, without dropout."""

    def make(package: ModuleType, name: str, model: Any = None, **options: Any) -> Any:
        case = CASES[name]
        model = tiny_encoder().double().eval() if model is None else model
        options = case.options | options
        if case.around and "loss" not in options:
            options["loss"] = make(package, case.around, model)
        if case.guided and "guide" not in options:
            torch.manual_seed(5)
            guide = tiny_encoder().double().eval()
            with torch.no_grad():
                for parameter in guide.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            options["guide"] = guide
        torch.manual_seed(3)  # for the layers of a loss's own
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return getattr(package, name)(model, **options).double()

    return make


@pytest.fixture
def model_of() -> Callable[[Any], Any]:
    """The model that a loss trains, by whichever name it holds it."""
    names = ("model", "sentence_embedder", "model2", "encoder")
    return lambda loss: next(getattr(loss, name) for name in names if hasattr(loss, name))


@pytest.fixture
def batch(texts: Callable[..., list[str]]) -> Callable[..., tuple[list[dict[str, Any]], Tensor | None]]:
    """Makes the feature dicts and the labels of a batch for a loss, new ones every time."""

    def batch(name: str, model: Any, rows: int = ROWS) -> tuple[list[dict[str, Any]], Tensor | None]:
        case = CASES[name]
        columns = [model.preprocess(texts(rows, seed=column)) for column in range(case.columns)]
        return columns, case.labels()

    return batch


@pytest.fixture
def value_and_gradients(batch: Callable[..., Any]) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """The value of a loss on its batch, and the gradient of each of its parameters that gets one."""

    def run(name: str, loss: Any, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss.zero_grad()
        columns, labels = batch(name, model)
        value = loss(columns, labels)
        if isinstance(value, dict):
            value = torch.stack(list(value.values())).sum()
        value.backward()
        return value.detach(), {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}

    return run
