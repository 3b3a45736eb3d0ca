"""The losses of pairs and triplets against sentence-transformers' classes of the same names."""

import copy
import importlib
import itertools
import pickle
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tileloss
from tileloss import losses
from tileloss.errors import ColumnsError, DtypeError, MissingError, ShapeError
from tileloss.losses import SiameseDistanceMetric, TripletDistanceMetric

oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
util = pytest.importorskip("sentence_transformers.util")

SIAMESE = ("EUCLIDEAN", "MANHATTAN", "COSINE_DISTANCE")
TRIPLET = ("EUCLIDEAN", "MANHATTAN", "COSINE")
PAIR_LOSSES = ("CosineSimilarityLoss", "ContrastiveLoss", "OnlineContrastiveLoss")


class Identity(nn.Module):
    """A model whose features are its embeddings already."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features


class Squash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (1 + x.tanh()) / 2


def dot_distance(a: Tensor, b: Tensor) -> Tensor:
    return (1 - (a * b).sum(dim=1)).abs()


# class, its options, columns, and what the labels are
CASES: list[tuple[str, dict[str, Any], int, str]] = [
    ("CosineSimilarityLoss", {}, 2, "graded"),
    ("CosineSimilarityLoss", {"loss_fct": nn.L1Loss(), "cos_score_transformation": Squash()}, 2, "graded"),
    ("ContrastiveLoss", {}, 2, "binary"),
    ("ContrastiveLoss", {"size_average": False, "margin": 1.2}, 2, "graded"),
    ("ContrastiveLoss", {"distance_metric": dot_distance}, 2, "binary"),
    ("OnlineContrastiveLoss", {}, 2, "binary"),
    ("OnlineContrastiveLoss", {"margin": 1.2}, 2, "some"),
    ("OnlineContrastiveLoss", {"distance_metric": dot_distance}, 2, "binary"),
    ("TripletLoss", {}, 3, "none"),
    ("TripletLoss", {"distance_metric": dot_distance, "triplet_margin": 0.1}, 3, "none"),
    *((loss, {"metric": name, "margin": 1.5}, 2, "binary") for loss in PAIR_LOSSES[1:] for name in SIAMESE),
    *(("TripletLoss", {"metric": name, "triplet_margin": 0.2}, 3, "none") for name in TRIPLET),
]
IDS = [f"{loss}-{i}" for i, (loss, *_) in enumerate(CASES)]
SHAPES = list(itertools.product([1, 2, 63, 100, 257], [3, 65]))


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of a few rows, and no word about labels that are not binary."""
    monkeypatch.setitem(importlib.import_module("tileloss.tiled.pairs")._BLOCK_BYTES, "cpu", 7 * 65 * 8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[a-zA-Z]*ContrastiveLoss expects binary labels")
        yield


def made(library: Any, loss: str, options: dict[str, Any], of: Any = None) -> Any:
    """A loss of a library, with the stock metric of that library, or of another."""
    options = dict(options)
    if "metric" in options:
        family = "TripletDistanceMetric" if loss == "TripletLoss" else "SiameseDistanceMetric"
        options["distance_metric"] = getattr(getattr(of or library, family), options.pop("metric"))
    return getattr(library, loss)(Identity(), **options)


def batch(size: int, width: int, columns: int, dtype: torch.dtype = torch.double) -> list[Tensor]:
    """Rows of length about one, with a zero row and two equal ones where there is room."""
    torch.manual_seed(0)
    found = [torch.randn(size, width) / width**0.5 for _ in range(columns)]
    if size > 10:
        found[0][3], found[1][4], found[1][5], found[1][6:20] = 0.0, 0.0, found[0][5], 0.8 * found[0][6:20]
    return [x.to(dtype) for x in found]


def labels_of(kind: str, size: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(1)
    if kind == "graded":
        return torch.rand(size, generator=generator)
    if kind == "none":
        return None
    numbers = torch.randint(2 if kind == "binary" else 3, (size,), generator=generator)
    return numbers if kind == "binary" else numbers / 2


def value_and_gradients(loss: nn.Module, embeddings: Sequence[Tensor], labels: Tensor | None) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in embeddings]
    value = loss([{"sentence_embedding": x} for x in leaves], labels)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def compare(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).double().norm() <= tolerance * b.double().norm() + 1e-12


@pytest.mark.parametrize(("loss", "options", "columns", "kind"), CASES, ids=IDS)
def test_float64_agrees_to_1e_8(loss: str, options: dict[str, Any], columns: int, kind: str, backend: str) -> None:
    for size, width in SHAPES:
        inputs = batch(size, width, columns), labels_of(kind, size)
        expected = value_and_gradients(made(oracle, loss, options), *inputs)
        for metric_of in (losses, oracle):
            found = value_and_gradients(made(losses, loss, options, metric_of), *inputs)
            compare(found, expected, 1e-8)


@pytest.mark.parametrize(("loss", "options", "columns", "kind"), CASES, ids=IDS)
def test_float32_agrees_to_2e_4(loss: str, options: dict[str, Any], columns: int, kind: str, backend: str) -> None:
    for size, width in SHAPES[2:]:
        inputs = batch(size, width, columns, torch.float32), labels_of(kind, size)
        compare(*(value_and_gradients(made(library, loss, options), *inputs) for library in (losses, oracle)), 2e-4)


@pytest.mark.parametrize(("loss", "options", "columns", "kind"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_embeddings(
    dtype: torch.dtype, loss: str, options: dict[str, Any], columns: int, kind: str, backend: str
) -> None:
    """The oracle's dtypes, and numbers nearer to float64 than what rounding the inputs once more would give."""
    torch.manual_seed(0)
    inputs = [(torch.randn(40, 65) / 8).to(dtype) for _ in range(columns)]
    labels = labels_of(kind, 40)
    found = value_and_gradients(made(losses, loss, options), inputs, labels)
    theirs = value_and_gradients(made(oracle, loss, options), inputs, labels)
    exact = value_and_gradients(made(oracle, loss, options), [x.double() for x in inputs], labels)
    assert [x.dtype for x in found] == [x.dtype for x in theirs]
    if "distance_metric" in options:
        return  # a callable of the user's computes in the dtype that it is given
    for a, b in zip(found, exact, strict=True):
        assert (a.double() - b).norm() <= 2 * torch.finfo(dtype).eps * b.norm()


def test_the_automatic_choice_agrees_at_any_size() -> None:
    for size in (20, 1200):
        for loss, options, columns, kind in CASES:
            inputs = batch(size, 65, columns), labels_of(kind, size)
            compare(
                *(value_and_gradients(made(library, loss, options), *inputs) for library in (losses, oracle)), 1e-8
            )


@pytest.mark.parametrize(("loss", "options", "columns", "kind"), CASES, ids=IDS)
def test_degenerate_batches(loss: str, options: dict[str, Any], columns: int, kind: str, backend: str) -> None:
    """No row; one label alone; no label that counts; rows that are zero; labels (B, 1)."""
    settings: list[tuple[int, Any]] = [
        (0, torch.zeros(0)),
        (5, torch.zeros(5)),
        (5, torch.ones(5, 1)),
        (1, torch.ones(1)),
    ]
    settings += [(5, torch.full((5,), 0.5)), (4, torch.tensor([1, 0, 0, 0]).int()), (4, torch.tensor([0, 1, 1, 1]))]
    for size, labels in settings:
        for zeros in (False, True):
            inputs = [x * (0.0 if zeros else 1.0) for x in batch(size, 3, columns)]
            found, expected = (
                value_and_gradients(made(library, loss, options), inputs, labels) for library in (losses, oracle)
            )
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_hinges_at_exactly_zero_have_no_gradient(backend: str) -> None:
    anchors = torch.tensor([[0.0, 0.0]])
    others = [torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]])]
    for library in (losses, oracle):
        value, *gradients = value_and_gradients(library.TripletLoss(Identity()), [anchors, *others], None)
        assert value == 0
        assert not any(x.any() for x in gradients)


@pytest.mark.parametrize(("loss", "options", "columns", "kind"), CASES, ids=IDS)
def test_configuration_and_citation(loss: str, options: dict[str, Any], columns: int, kind: str) -> None:
    theirs = made(oracle, loss, options)
    for metric_of in (losses, oracle):
        ours = made(losses, loss, options, metric_of)
        assert list(ours.get_config_dict().items()) == list(theirs.get_config_dict().items())
    assert re.findall(r"{\w+,", getattr(ours, "citation", "")) == re.findall(r"{\w+,", getattr(theirs, "citation", ""))
    assert hasattr(ours, "citation") == hasattr(theirs, "citation")


@pytest.mark.parametrize(("loss", "options", "columns", "kind"), CASES, ids=IDS)
def test_double_backward_is_the_oracles(
    loss: str, options: dict[str, Any], columns: int, kind: str, backend: str
) -> None:
    """Away from zero rows, at which the oracle's second derivative is nan."""
    torch.manual_seed(2)
    inputs = [torch.randn(6, 5, dtype=torch.double) for _ in range(columns)]
    results = []
    for library in (losses, oracle):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = made(library, loss, options).compute_loss_from_embeddings(leaves, labels_of(kind, 6))
        first = torch.autograd.grad(value, leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(x.square().sum() for x in first), leaves, allow_unused=True))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(
            torch.zeros(6, 5).double() if a is None else a, torch.zeros_like(inputs[0]) if b is None else b
        )


def test_metrics_by_themselves_are_the_oracles(backend: str) -> None:
    a, b = batch(20, 5, 2)
    for family, names in (("SiameseDistanceMetric", SIAMESE), ("TripletDistanceMetric", TRIPLET)):
        for name in names:
            found, expected = (getattr(getattr(library, family), name)(a, b) for library in (losses, oracle))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        ours, theirs = (getattr(library, family) for library in (losses, oracle))
        assert list(ours) == list(theirs) == []
        assert [key for key in vars(ours) if not key.startswith("_")] == [
            key for key in vars(theirs) if not key.startswith("_")
        ]


def test_namesakes_of_stock_metrics_are_left_alone() -> None:
    """A module that borrows the oracle's class does not make its own functions stock ones."""
    ours = losses.TripletLoss(Identity(), distance_metric=lambda a, b: (a - b).square().sum(1))
    assert ours.get_config_dict()["distance_metric"] == "<lambda>"
    theirs = oracle.TripletLoss(Identity(), distance_metric=ours.distance_metric)
    compare(*(value_and_gradients(loss, batch(20, 5, 3), None) for loss in (ours, theirs)), 1e-12)


def test_a_replaced_metric_is_heeded() -> None:
    loss = losses.ContrastiveLoss(Identity())
    loss.distance_metric = SiameseDistanceMetric.EUCLIDEAN
    inputs = batch(20, 5, 2), labels_of("binary", 20)
    expected = made(oracle, "ContrastiveLoss", {"metric": "EUCLIDEAN"})
    compare(value_and_gradients(loss, *inputs), value_and_gradients(expected, *inputs), 1e-8)


@pytest.mark.parametrize("loss", PAIR_LOSSES[1:])
def test_other_labels_are_warned_of_once(loss: str) -> None:
    for labels, said in ((torch.tensor([0.0, 1.0]), 0), (torch.tensor([0.0, 0.5]), 1), (torch.tensor([2, 1]), 1)):
        for library in (losses, oracle):
            instance = getattr(library, loss)(Identity())
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(2):
                    instance([{"sentence_embedding": x} for x in batch(2, 3, 2)], labels)
            assert [w.category for w in caught] == [UserWarning] * said
            assert all(f"{loss} expects binary labels (0 or 1)" in str(w.message) for w in caught)
            assert instance._checked_labels


def test_boolean_labels() -> None:
    inputs = batch(4, 3, 2), torch.tensor([True, False, True, False])
    for loss in ("CosineSimilarityLoss", "OnlineContrastiveLoss"):
        compare(*(value_and_gradients(made(library, loss, {}), *inputs) for library in (losses, oracle)), 1e-8)
    with pytest.raises(RuntimeError):
        value_and_gradients(oracle.ContrastiveLoss(Identity()), *inputs)
    with pytest.raises(DtypeError, match="must be numbers, got booleans"):
        value_and_gradients(losses.ContrastiveLoss(Identity()), *inputs)


ROW = {"sentence_embedding": torch.randn(4, 3)}
WRONG: list[tuple[str, int, Tensor | None, type[Exception], str]] = [
    *((loss, 2, torch.zeros(3), ShapeError, rf"{loss} expects 4 labels \(one per example\)") for loss in PAIR_LOSSES),
    *((loss, 2, None, MissingError, f"{loss} needs labels") for loss in PAIR_LOSSES),
    *((loss, 1, torch.zeros(4), ColumnsError, f"{loss} expects .* 2 input columns") for loss in PAIR_LOSSES),
    ("ContrastiveLoss", 3, torch.zeros(4), ColumnsError, "exactly 2 input columns"),
    ("TripletLoss", 2, None, ColumnsError, r"exactly 3 input columns, \(anchor, positive, negative\), but got 2"),
    ("TripletLoss", 4, None, ColumnsError, "exactly 3 input columns"),
]


@pytest.mark.parametrize(("loss", "columns", "labels", "kind", "message"), WRONG)
def test_bad_batches(loss: str, columns: int, labels: Tensor | None, kind: type[Exception], message: str) -> None:
    """Where the oracle raises, so do we, an error of its type."""
    with pytest.raises((ValueError, LookupError, AttributeError, AssertionError), match=r"^") as theirs:
        getattr(oracle, loss)(Identity())([ROW] * columns, labels)
    with pytest.raises(kind, match=message) as ours:
        getattr(losses, loss)(Identity())([ROW] * columns, labels)
    assert isinstance(ours.value, theirs.type)


def test_further_columns_are_ignored(backend: str) -> None:
    embeddings, labels = batch(9, 3, 3), labels_of("binary", 9)
    for loss in ("CosineSimilarityLoss", "OnlineContrastiveLoss"):
        two, three = (
            made(losses, loss, {})([{"sentence_embedding": x} for x in e], labels)
            for e in (embeddings[:2], embeddings)
        )
        assert torch.equal(two, three)
    online = losses.OnlineContrastiveLoss(Identity())
    assert torch.equal(online([{"sentence_embedding": x} for x in embeddings[:2]], labels, size_average=True), two)


@pytest.mark.parametrize(("loss", "options", "columns", "kind"), CASES[:1] + CASES[2:3] + CASES[5:6] + CASES[8:9])
def test_one_graph_under_a_compiler(loss: str, options: dict[str, Any], columns: int, kind: str) -> None:
    torch.compiler.reset()
    instance, labels = made(losses, loss, options), labels_of(kind, 20)
    embeddings = batch(20, 5, columns, torch.float32)
    expected = instance.compute_loss_from_embeddings(embeddings, labels)  # looks at the labels, this once
    compiled = torch.compile(instance.compute_loss_from_embeddings, fullgraph=True, backend="aot_eager")
    with tileloss.use_backend("tiled"):
        torch.testing.assert_close(compiled(embeddings, labels), expected)


@pytest.mark.parametrize("loss", ["CosineSimilarityLoss", "ContrastiveLoss", "OnlineContrastiveLoss", "TripletLoss"])
def test_copies_and_pickles(loss: str) -> None:
    instance = getattr(losses, loss)(Identity())
    for twin in (copy.deepcopy(instance), pickle.loads(pickle.dumps(instance))):
        assert twin.get_config_dict() == instance.get_config_dict()
        assert list(dict(twin.named_children())) == list(dict(instance.named_children()))


def test_names_lead_to_the_same_classes() -> None:
    for module in ("contrastive", "online_contrastive", "cosine_similarity", "triplet"):
        ours, theirs = (
            vars(importlib.import_module(f"{package}.{module}"))
            for package in ("tileloss.losses", "sentence_transformers.sentence_transformer.losses")
        )
        for name in (n for n in theirs if n.endswith(("Loss", "DistanceMetric"))):
            assert ours[name].__name__ == name
    assert losses.triplet.TripletDistanceMetric is TripletDistanceMetric
