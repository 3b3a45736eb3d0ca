"""The losses of a teacher's scores, MarginMSE and DistillKLDiv, against sentence-transformers' classes."""

import logging
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tileloss.paired
from tileloss.errors import ColumnsError, InputError, MissingError, ShapeError
from tileloss.losses import DistillKLDivLoss, MarginMSELoss

oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
their_similarities = pytest.importorskip("sentence_transformers.util")

KINDS = [MarginMSELoss, DistillKLDivLoss]
NAMES = ["pairwise_dot_score", "pairwise_cos_sim", "pairwise_euclidean_sim", "pairwise_manhattan_sim"]
SHAPES = [(1, 2, 3), (2, 2, 1), (63, 2, 65), (100, 5, 3), (257, 3, 65)]  # queries, documents, width


class Identity(nn.Module):
    """A model whose features are its embeddings already."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features


def columns(size: int, docs: int, width: int, dtype: torch.dtype = torch.double) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, width).to(dtype) for _ in range(1 + docs)]


def scores(size: int, docs: int, dtype: torch.dtype = torch.double) -> Tensor:
    return torch.randn(size, docs, generator=torch.Generator().manual_seed(1)).to(dtype)


def value_and_gradients(loss: nn.Module, embeddings: list[Tensor], labels: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in embeddings]
    value = loss([{"sentence_embedding": x} for x in leaves], labels)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def compare(
    kind: type[nn.Module], embeddings: list[Tensor], labels: Tensor, tolerance: float, *options: Any, **named: Any
) -> None:
    found, expected = (
        value_and_gradients(one(Identity(), *options, **named), embeddings, labels)
        for one in (kind, getattr(oracle, kind.__name__))
    )
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).float().norm() <= tolerance * b.float().norm() + 1e-12


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_float64_agrees_to_1e_8(kind: type[nn.Module], shape: tuple[int, int, int], name: str, backend: str) -> None:
    """With our functions of these names as with sentence-transformers' own."""
    theirs = getattr(their_similarities, name)
    compare(kind, columns(*shape), scores(*shape[:2]), 1e-8, theirs)
    ours = kind(Identity(), getattr(tileloss.paired, name))
    found, expected = (
        loss.compute_loss_from_embeddings(columns(*shape), scores(*shape[:2]))  # type: ignore[operator]
        for loss in (ours, kind(Identity(), theirs))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_agrees_to_2e_4(kind: type[nn.Module], shape: tuple[int, int, int], backend: str) -> None:
    compare(kind, columns(*shape, torch.float32), scores(*shape[:2], torch.float32), 2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_embeddings(kind: type[nn.Module], dtype: torch.dtype, backend: str) -> None:
    """A float32 loss, gradients in the embeddings' dtype, equal to the oracle's within that dtype's rounding."""
    compare(kind, columns(40, 3, 65, dtype), scores(40, 3, torch.float32), 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", KINDS)
def test_the_labels_dtype_counts(kind: type[nn.Module], backend: str) -> None:
    compare(kind, columns(9, 3, 4, torch.float32), scores(9, 3), 2e-4)
    compare(kind, columns(9, 3, 4), scores(9, 3, torch.float16), 1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_automatic_choice_agrees_at_any_size(kind: type[nn.Module]) -> None:
    for size in (20, 500):
        compare(kind, columns(size, 3, 512), scores(size, 3), 1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_strides_equal_rows_and_zeros(kind: type[nn.Module], backend: str) -> None:
    query, positive, negative = columns(9, 2, 4)
    query[3], positive[5] = 0.0, query[5]
    for name in NAMES:
        theirs = getattr(their_similarities, name)
        compare(kind, [query, positive.T.contiguous().T, negative], scores(9, 2), 1e-8, theirs)
        compare(kind, [query, positive, negative[:1].expand(9, 4)], scores(9, 2), 1e-8, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch(kind: type[nn.Module], backend: str) -> None:
    found, expected = (
        value_and_gradients(one(Identity()), columns(0, 2, 4), scores(0, 2))[0]
        for one in (kind, getattr(oracle, kind.__name__))
    )
    assert found.isnan()
    assert expected.isnan()


def tilted(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=1).tanh() + a[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_any_other_similarity_is_called(kind: type[nn.Module], backend: str) -> None:
    compare(kind, columns(20, 3, 5), scores(20, 3), 1e-8, tilted)


def test_the_models_own_similarity(tiny_encoder: Any, backend: str) -> None:
    model = tiny_encoder()
    for name in ("cosine", "euclidean"):
        model.similarity_fn_name = name
        for kind in KINDS:
            compare(kind, columns(9, 2, 4), scores(9, 2), 1e-8, model.similarity_pairwise)
            loss, theirs = (one(model, model.similarity_pairwise) for one in (kind, getattr(oracle, kind.__name__)))
            assert loss.get_config_dict() == theirs.get_config_dict()


FORMS: list[tuple[int, Callable[[Tensor], Tensor]]] = [
    (2, lambda s: s),
    (2, lambda s: s[:, 0] - s[:, 1]),
    (2, lambda s: s[:, :1] - s[:, 1:]),
    (4, lambda s: s),
    (4, lambda s: s[:, :1] - s[:, 1:]),
]


@pytest.mark.parametrize(("docs", "form"), FORMS)
def test_margins_and_scores_say_the_same(docs: int, form: Callable[[Tensor], Tensor], backend: str) -> None:
    embeddings, labels = columns(20, docs, 5), scores(20, docs)
    compare(MarginMSELoss, embeddings, form(labels), 1e-8)
    loss = MarginMSELoss(Identity())
    found, expected = (loss.compute_loss_from_embeddings(embeddings, x) for x in (form(labels), labels))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_integer_margins(backend: str) -> None:
    compare(MarginMSELoss, columns(20, 3, 5, torch.float32), torch.arange(40).view(20, 2), 2e-4)


@pytest.mark.parametrize("temperatures", [(2.0,), (1.0, 0.5), (1.0, None, 3.0), (0.7, 2.0, 4), (True,)])
def test_temperatures(temperatures: tuple[Any, ...], backend: str) -> None:
    similarity = their_similarities.pairwise_cos_sim
    compare(DistillKLDivLoss, columns(20, 4, 5), scores(20, 4), 1e-8, similarity, *temperatures)
    loss, theirs = (kind(None, similarity, *temperatures) for kind in (DistillKLDivLoss, oracle.DistillKLDivLoss))
    assert list(loss.get_config_dict().items()) == list(theirs.get_config_dict().items())


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, False])
@pytest.mark.parametrize("name", ["temperature", "student_temperature", "teacher_temperature"])
def test_temperatures_must_be_positive_and_finite(name: str, value: float) -> None:
    for kind in (oracle.DistillKLDivLoss, DistillKLDivLoss):
        with pytest.raises(ValueError, match=f"{name} must be a positive finite number, got {value}"):
            kind(Identity(), **{name: value})
    with pytest.raises(InputError):
        DistillKLDivLoss(Identity(), **{name: value})


def test_minus_infinity_leaves_a_document_out(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    labels = scores(20, 4)
    labels[::2, 3] = -math.inf
    compare(DistillKLDivLoss, columns(20, 4, 5), labels, 1e-8)
    assert not caplog.text


def test_nan_scores_are_seen_at_the_first_call() -> None:
    good, bad = scores(20, 3), scores(20, 3)
    bad[4, 1] = math.nan
    for kind in (oracle.DistillKLDivLoss, DistillKLDivLoss):
        loss = kind(Identity())
        with pytest.raises(ValueError, match="teacher scores contain NaN"):
            loss.compute_loss_from_embeddings(columns(20, 3, 5), bad)
        checked = kind(Identity())
        checked.compute_loss_from_embeddings(columns(20, 3, 5), good)
        assert checked.compute_loss_from_embeddings(columns(20, 3, 5), bad).isnan()


def test_underflow_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    labels = scores(20, 3, torch.float32)
    labels[4, 1] -= 30.0
    for kind in (oracle.DistillKLDivLoss, DistillKLDivLoss):
        caplog.clear()
        loss = kind(Identity(), teacher_temperature=0.1)
        for _ in range(2):
            loss.compute_loss_from_embeddings(columns(20, 3, 5, torch.float32), labels)
        assert len(caplog.records) == 1
        assert caplog.records[0].levelno == logging.WARNING
        assert "teacher_temperature=0.1" in caplog.text
        assert re.search(r"1 of\s+60 .*carry no gradient", caplog.text)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_too_few_columns_are_refused_before_work(kind: type[nn.Module], count: int) -> None:
    class Model(nn.Module):
        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            raise AssertionError("work was done before the error")

    embeddings = columns(4, 2, 3)[:count]
    features = [{"sentence_embedding": x} for x in embeddings]
    with pytest.raises((ValueError, IndexError, RuntimeError)) as theirs:
        getattr(oracle, kind.__name__)(Identity())(features, scores(4, max(count - 1, 0)))
    with pytest.raises(type(theirs.value), match=f"at least 3 .*got {count}"):
        kind(Model())(iter(features), scores(4, 2))
    with pytest.raises(ColumnsError):
        kind(Identity()).compute_loss_from_embeddings(embeddings, scores(4, 2))  # type: ignore[operator]


WRONG_LABELS: list[tuple[type[nn.Module], Any, str]] = [
    (MarginMSELoss, scores(4, 1), r"Labels shape \(4, 1\) does not match expected shape \(4, 2\)"),
    (MarginMSELoss, scores(4, 4), "does not match expected shape"),
    (MarginMSELoss, scores(4, 2)[:, 0], "does not match expected shape"),
    (MarginMSELoss, scores(3, 2), "does not match expected shape"),
    (DistillKLDivLoss, scores(4, 2), r"teacher scores of shape \(batch_size, N\) = \(4, 3\).* got \(4, 2\)"),
    (DistillKLDivLoss, scores(4, 3)[:, 0], "teacher scores of shape"),
    (DistillKLDivLoss, scores(3, 3), "teacher scores of shape"),
]


@pytest.mark.parametrize(("kind", "labels", "message"), WRONG_LABELS)
def test_labels_that_do_not_fit(kind: type[nn.Module], labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # in the oracle's words
        getattr(oracle, kind.__name__)(Identity()).compute_loss_from_embeddings(columns(4, 3, 5), labels)
    with pytest.raises(ShapeError, match=message):
        kind(Identity()).compute_loss_from_embeddings(columns(4, 3, 5), labels)  # type: ignore[operator]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_needed(kind: type[nn.Module]) -> None:
    with pytest.raises(AttributeError):
        getattr(oracle, kind.__name__)(Identity()).compute_loss_from_embeddings(columns(4, 3, 5), None)
    with pytest.raises(MissingError, match="needs labels: the teacher's"):
        kind(Identity()).compute_loss_from_embeddings(columns(4, 3, 5), None)  # type: ignore[operator]


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_that_do_not_fit(kind: type[nn.Module]) -> None:
    for place, other in ((1, torch.randn(4, 2)), (3, torch.randn(3, 5)), (2, torch.randn(4))):
        embeddings = columns(4, 3, 5, torch.float32)
        embeddings[place] = other
        with pytest.raises((ValueError, RuntimeError, IndexError)) as theirs:
            getattr(oracle, kind.__name__)(Identity()).compute_loss_from_embeddings(embeddings, scores(4, 3))
        with pytest.raises(type(theirs.value), match=r"rows of b|b\[|matrix"):
            kind(Identity()).compute_loss_from_embeddings(embeddings, scores(4, 3))  # type: ignore[operator]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_get_no_gradient(kind: type[nn.Module], backend: str) -> None:
    labels = scores(4, 3).requires_grad_()
    leaves = [x.requires_grad_() for x in columns(4, 3, 5)]
    kind(Identity()).compute_loss_from_embeddings(leaves, labels).backward()  # type: ignore[operator]
    assert labels.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_the_oracles(kind: type[nn.Module]) -> None:
    loss, theirs = (one(Identity()) for one in (kind, getattr(oracle, kind.__name__)))
    assert list(loss.get_config_dict().items()) == list(theirs.get_config_dict().items())
    assert re.search(r"@\w+\{(\S+),", loss.citation)[1] == re.search(r"@\w+\{(\S+),", theirs.citation)[1]  # type: ignore[index]
    assert [name for name, _ in loss.named_children()] == [name for name, _ in theirs.named_children()]
    assert repr(loss.loss_fct) == repr(theirs.loss_fct)
    copy = pickle.loads(pickle.dumps(loss))
    assert torch.equal(*(x.compute_loss_from_embeddings(columns(9, 2, 5), scores(9, 2)) for x in (loss, copy)))


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_may_be_given_without_a_model(kind: type[nn.Module], backend: str) -> None:
    embeddings, labels = columns(9, 3, 5), scores(9, 3)
    value = kind(Identity()).compute_loss_from_embeddings(embeddings, labels)  # type: ignore[operator]
    assert torch.equal(value, value_and_gradients(kind(Identity()), embeddings, labels)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_replaced_loss_function_is_called(kind: type[nn.Module], backend: str) -> None:
    losses = [one(Identity()) for one in (kind, getattr(oracle, kind.__name__))]
    for loss in losses:
        loss.loss_fct = nn.SmoothL1Loss()
    found, expected = (value_and_gradients(loss, columns(9, 3, 5), scores(9, 3)) for loss in losses)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind: type[nn.Module], backend: str) -> None:
    leaves, labels = [x.requires_grad_() for x in columns(4, 2, 3)], scores(4, 2)
    loss = kind(Identity())
    torch.autograd.gradgradcheck(lambda *x: loss.compute_loss_from_embeddings(list(x), labels), leaves)  # type: ignore[operator]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_trains(kind: type[nn.Module], tiny_encoder: Any, texts: Any, backend: str) -> None:
    """A transformer in training mode, with dropout: the same step as the oracle's."""
    results = []
    for one in (kind, getattr(oracle, kind.__name__)):
        model = tiny_encoder().double()
        features = [dict(model.preprocess(texts(20, seed))) for seed in range(4)]
        torch.manual_seed(2)
        value = one(model)(features, scores(20, 3))
        value.backward()
        results.append([value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    largest = max(x.norm() for x in results[1])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-8 * (b.norm() + 1e-3 * largest)
