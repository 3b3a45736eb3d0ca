"""The softmax loss against sentence-transformers' class of the same name."""

import itertools
import logging
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tileloss.backend import use_backend
from tileloss.errors import DtypeError, InputError, ShapeError
from tileloss.losses import SoftmaxLoss

oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

FLAGS = [flags for flags in itertools.product((True, False), repeat=3) if any(flags)]
SHAPES = [(1, 3), (2, 1), (63, 65), (100, 5), (257, 3)]


class Identity(nn.Module):
    """A model whose features are its embeddings already."""

    device = torch.device("cpu")

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features


def pair(size: int, width: int, dtype: torch.dtype = torch.double) -> list[Tensor]:
    torch.manual_seed(0)
    first, second = torch.randn(size, width), torch.randn(size, width)
    second[::5] = first[::5]
    return [first.to(dtype), second.to(dtype)]


def value_and_gradients(
    kind: type, embeddings: list[Tensor], labels: Tensor, dtype: torch.dtype, *options: Any
) -> list[Tensor]:
    """The loss, and the gradients of embeddings and layer."""
    torch.manual_seed(1)
    loss = kind(Identity(), embeddings[0].shape[1], *options).to(dtype)
    leaves = [x.clone().requires_grad_() for x in embeddings]
    value = loss([{"sentence_embedding": x} for x in leaves], labels)
    return [value.detach(), *torch.autograd.grad(value, [*leaves, *loss.classifier.parameters()])]


def compare(embeddings: list[Tensor], labels: Tensor, tolerance: float, dtype: torch.dtype, *options: Any) -> None:
    found, expected = (
        value_and_gradients(kind, embeddings, labels, dtype, *options) for kind in (SoftmaxLoss, oracle.SoftmaxLoss)
    )
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).float().norm() <= tolerance * b.float().norm() + 1e-12


def classes(size: int) -> Tensor:
    return torch.arange(size) % 3


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_agrees_to_1e_8(shape: tuple[int, int], flags: tuple[bool, ...], backend: str) -> None:
    compare(pair(*shape), classes(shape[0]), 1e-8, torch.double, 3, *flags)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_agrees_to_2e_4(shape: tuple[int, int], backend: str) -> None:
    compare(pair(*shape, torch.float32), classes(shape[0]), 2e-4, torch.float32, 3)


@pytest.mark.parametrize("layer", [torch.float32, None], ids=["float32 layer", "narrow layer"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_embeddings(dtype: torch.dtype, layer: torch.dtype | None, backend: str) -> None:
    """A loss in the layer's dtype, gradients in the embeddings', equal to the oracle's within that rounding."""
    compare(pair(40, 65, dtype), classes(40), 3 * torch.finfo(dtype).eps, layer or dtype, 3)


def test_the_automatic_choice_agrees_at_any_size() -> None:
    for size in (20, 600):
        compare(pair(size, 512), classes(size), 1e-8, torch.double, 3)


@pytest.mark.parametrize("labels", [
    torch.softmax(torch.randn(20, 3, dtype=torch.double), dim=1), classes(20)[:, None], classes(20).int().long(),
])  # fmt: skip
def test_forms_of_labels(labels: Tensor, backend: str) -> None:
    compare(pair(20, 5), labels, 1e-8, torch.double, 3)


def test_another_loss_function(backend: str) -> None:
    """With one label it is a regression; the labels are flattened even where they have the logits' shape."""
    compare(pair(20, 5), torch.zeros(20, 1).long(), 1e-8, torch.double, 1)
    flat = lambda logits, labels: nn.functional.mse_loss(logits.squeeze(1), labels)  # noqa: E731
    compare(pair(20, 5), torch.rand(20, 1, dtype=torch.double), 1e-8, torch.double, 1, True, True, False, flat)


def test_an_empty_batch_is_nan(backend: str) -> None:
    for kind in (SoftmaxLoss, oracle.SoftmaxLoss):
        assert value_and_gradients(kind, pair(0, 5), classes(0), torch.double, 3)[0].isnan()


def test_without_labels_there_are_embeddings_and_logits(backend: str) -> None:
    features = [{"sentence_embedding": x} for x in pair(20, 5, torch.float32)]
    results = []
    for kind in (SoftmaxLoss, oracle.SoftmaxLoss):
        torch.manual_seed(1)
        results.append(kind(Identity(), 5, 3)(features, None))
    (embeddings, logits), (their_embeddings, their_logits) = results
    torch.testing.assert_close(logits, their_logits)
    assert all(a is b for a, b in zip(embeddings, their_embeddings, strict=True))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_other_than_two_columns(count: int) -> None:
    class Model(Identity):
        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            raise AssertionError("work was done before the error")

    features = [{"sentence_embedding": torch.randn(4, 3)}] * count
    with pytest.raises(ValueError, match="values to unpack"):
        oracle.SoftmaxLoss(Identity(), 3, 3)(features, classes(4))
    with pytest.raises(ShapeError, match=f"exactly 2 input columns.* got {count}"):
        SoftmaxLoss(Model(), 3, 3)(iter(features), classes(4))


def test_calls_refuse_what_the_oracle_refuses(backend: str) -> None:
    a, b = pair(4, 3, torch.float32)
    for embeddings, labels, message in (
        ([a, b[:3]], classes(4), "row i of both is one pair"),
        ([a[:, :2], b[:, :2]], classes(4), "3 vectors of 2 numbers"),
        ([a, b], classes(3), "batch_size"),
        ([a, b], torch.eye(4, 3).long(), "Expected floating point type"),
    ):
        features = [{"sentence_embedding": x} for x in embeddings]
        with pytest.raises((ValueError, RuntimeError)) as theirs:
            oracle.SoftmaxLoss(Identity(), 3, 3)(features, labels)
        with pytest.raises(type(theirs.value), match=message):
            SoftmaxLoss(Identity(), 3, 3)(features, labels)


@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        (torch.randn(4, 3), torch.randn(4, 1), ShapeError, "row i of both is one pair"),
        (torch.randn(4, 2), torch.randn(4, 2), ShapeError, "3 vectors of 2 numbers"),
        (torch.randn(4), torch.randn(4), ShapeError, "must be a matrix"),
        (torch.randn(2, 4, 9), torch.randn(2, 4, 9), ShapeError, "must be a matrix"),  # as wide as the layer
        (torch.ones(4, 3).long(), torch.ones(4, 3).long(), DtypeError, "floating-point"),
    ],
    ids=["widths", "layer", "vectors", "stacked", "integers"],
)
def test_few_pairs_that_do_not_fit_are_refused_with_the_reason(
    first: Tensor, second: Tensor, error: type[Exception], message: str
) -> None:
    """Of their own accord few pairs go to the layer as they are, which would say less, or take what it should not."""
    with pytest.raises(error, match=message):
        SoftmaxLoss(Identity(), 3, 3)([{"sentence_embedding": x} for x in (first, second)], classes(4))


def test_few_narrow_pairs_are_read_in_the_dtype_of_the_layer() -> None:
    embeddings = [{"sentence_embedding": x} for x in pair(4, 3, torch.bfloat16)]
    loss = SoftmaxLoss(Identity(), 3, 3)
    with use_backend("reference"):
        expected = loss(embeddings, classes(4))
    assert torch.equal(loss(embeddings, classes(4)), expected)


def test_some_feature_is_needed() -> None:
    for kind in (oracle.SoftmaxLoss, SoftmaxLoss):
        with pytest.raises(ValueError, match="At least one of concatenation_sent_rep, concatenation_sent_difference"):
            kind(Identity(), 3, 3, False, False, False)
    with pytest.raises(InputError):
        SoftmaxLoss(Identity(), 3, 3, False, False, False)


def test_the_old_name_of_the_dimension(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loss = SoftmaxLoss(Identity(), sentence_embedding_dimension=4, num_labels=3)  # type: ignore[call-arg]
    assert "its name is now embedding_dimension" in caplog.text
    assert loss.classifier.in_features == 12
    both = SoftmaxLoss(Identity(), embedding_dimension=5, num_labels=3, sentence_embedding_dimension=4)  # type: ignore[call-arg]
    assert both.classifier.in_features == 15


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replaced(loss: nn.Module) -> None:
    torch.manual_seed(3)
    loss.classifier = Doubled(12, 3)


def hooked(loss: nn.Module) -> None:
    loss.classifier.register_forward_hook(lambda layer, given, output: 2 * output)


@pytest.mark.parametrize("change", [replaced, hooked])
def test_another_classifier_is_called(change: Any, backend: str) -> None:
    features = [{"sentence_embedding": x} for x in pair(20, 4, torch.float32)]
    values = []
    for kind in (SoftmaxLoss, oracle.SoftmaxLoss):
        torch.manual_seed(1)
        loss = kind(Identity(), 4, 3)
        plain = loss(features, classes(20))
        change(loss)
        values.append(loss(features, classes(20)))
        assert values[-1] != plain
    torch.testing.assert_close(*values)


def test_a_sequence_of_layers_is_called(backend: str) -> None:
    loss = SoftmaxLoss(Identity(), 4, 3)
    loss.classifier = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    loss([{"sentence_embedding": x} for x in pair(20, 4, torch.float32)], classes(20)).backward()
    assert all(p.grad is not None for p in loss.parameters())


@pytest.mark.parametrize(
    "options", [(), (False, True, True), (True, False, False, nn.CrossEntropyLoss(reduction="sum"))]
)
def test_settings_are_the_oracles(options: tuple[Any, ...]) -> None:
    torch.manual_seed(1)
    loss = SoftmaxLoss(Identity(), 5, 3, *options)
    torch.manual_seed(1)
    theirs = oracle.SoftmaxLoss(Identity(), 5, 3, *options)
    assert list(loss.get_config_dict().items()) == list(theirs.get_config_dict().items())
    assert re.search(r"@\w+\{(\S+),", loss.citation)[1] == re.search(r"@\w+\{(\S+),", theirs.citation)[1]  # type: ignore[index]
    assert [name for name, _ in loss.named_children()] == [name for name, _ in theirs.named_children()]
    assert loss.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in loss.state_dict().items())
    copy = pickle.loads(pickle.dumps(loss))
    features = [{"sentence_embedding": x} for x in pair(9, 5, torch.float32)]
    assert torch.equal(copy(features, classes(9)), loss(features, classes(9)))


def test_a_model_and_its_layer_train(tiny_encoder: Any, texts: Any, backend: str) -> None:
    """A transformer in training mode, with dropout: the same step as the oracle's."""
    results = []
    for kind in (SoftmaxLoss, oracle.SoftmaxLoss):
        model = tiny_encoder().double()
        torch.manual_seed(1)
        loss = kind(model, 16, 3).double()
        torch.manual_seed(2)
        value = loss([dict(model.preprocess(texts(30, seed))) for seed in (0, 1)], classes(30))
        value.backward()
        results.append([value.detach(), *(p.grad for p in loss.parameters() if p.grad is not None)])
    largest = max(x.norm() for x in results[1])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-8 * (b.norm() + 1e-3 * largest)
