"""CoSENT and AnglE, class against class with sentence-transformers'."""

import copy
import functools
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tileloss import losses, paired
from tileloss.errors import ColumnsError, InputError, MissingError, ShapeError

oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
util = pytest.importorskip("sentence_transformers.util")

NAMES = ("CoSENTLoss", "AnglELoss")
SHAPES = [(0, 3), (1, 3), (2, 1), (2, 65), (63, 3), (100, 64), (257, 65)]
LABELS: dict[str, Callable[[int], Tensor]] = {
    "all different": lambda size: torch.rand(size),
    "few": lambda size: torch.randint(4, (size,)),
    "two": lambda size: torch.rand(size, 1) < 0.5,
    "equal": torch.ones,
}


class Identity(nn.Module):
    """A model whose features are its embeddings already."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features


def columns_of(size: int, width: int, count: int = 2, dtype: torch.dtype = torch.double) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, width).to(dtype) for _ in range(count)]


def value_and_gradients(loss: Any, embeddings: list[Tensor], labels: Tensor | None) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in embeddings]
    value = loss([{"sentence_embedding": x} for x in leaves], labels)
    return [value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True)]


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Our loss and the stock one."""
    return getattr(losses, name)(Identity(), *args, **kwargs), getattr(oracle, name)(Identity(), *args, **kwargs)


def compare(both: tuple[Any, Any], embeddings: list[Tensor], labels: Tensor | None, tolerance: float = 1e-8) -> None:
    found, expected = (value_and_gradients(loss, embeddings, labels) for loss in both)
    for a, b in zip(found, expected, strict=True):
        if b is None:
            assert a is None
            continue
        assert a.dtype == b.dtype
        assert (a - b).double().norm() <= tolerance * b.double().norm() + 1e-12


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", NAMES)
def test_float64_agrees_to_1e_8(name: str, labels: str, backend: str) -> None:
    for size, width in SHAPES:
        compare(pair(name), columns_of(size, width), LABELS[labels](size))


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_to_2e_4(name: str, backend: str) -> None:
    for size, width in SHAPES[3:]:
        for scale in (1.0, 50.0):
            compare(pair(name, scale), columns_of(size, width, dtype=torch.float32), torch.rand(size), 2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_narrow_embeddings(name: str, dtype: torch.dtype, backend: str) -> None:
    """A float32 loss, gradients in the embeddings' dtype, equal to the oracle's within that dtype's rounding."""
    compare(pair(name), columns_of(60, 65, dtype=dtype), torch.rand(60), 3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", NAMES)
def test_the_automatic_choice_agrees_at_any_size(name: str) -> None:
    for size in (32, 300):
        compare(pair(name), columns_of(size, 65), torch.rand(size))


@pytest.mark.parametrize("similarity", ["cos", "dot", "euclidean", "manhattan", "angle"])
def test_similarities_by_our_functions_and_by_theirs(similarity: str, backend: str) -> None:
    theirs = getattr(util, {"dot": "pairwise_dot_score"}.get(similarity, f"pairwise_{similarity}_sim"))
    both = pair("CoSENTLoss", 2.0, theirs)
    compare(both, columns_of(40, 7), torch.rand(40))
    ours = losses.CoSENTLoss(Identity(), 2.0, getattr(paired, theirs.__name__))
    compare((ours, both[1]), columns_of(40, 7), torch.rand(40))
    assert ours.get_config_dict() == both[1].get_config_dict()


def weighted(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=1).tanh() * a[:, 0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [2, 4])
def test_a_similarity_of_the_users(name: str, count: int, backend: str) -> None:
    both = pair(name)
    for loss in both:
        loss.similarity_fct = weighted
    compare(both, columns_of(40, 7, count), torch.rand(40))


def test_a_narrow_similarity_is_raised_before_it_is_scaled(backend: str) -> None:
    both = pair("CoSENTLoss", 20.0, lambda a, b: (a * b).sum(dim=1))
    compare(both, columns_of(40, 7, dtype=torch.bfloat16), torch.rand(40), 1e-2)
    found, expected = (loss.compute_loss_from_embeddings(columns_of(40, 7, dtype=torch.float16), torch.rand(40))
                       for loss in both)  # fmt: skip
    assert found.dtype == expected.dtype == torch.float32


@pytest.mark.parametrize("count", [3, 6])
@pytest.mark.parametrize("labels", [None, *LABELS])
def test_negatives_of_angle(count: int, labels: str | None, backend: str) -> None:
    for size, width in SHAPES:
        if labels == "two" and size != 1:
            continue  # truth values cannot be subtracted from one, there as here
        given = None if labels is None else LABELS[labels](size)
        if labels == "two":
            for loss in pair("AnglELoss"):
                with pytest.raises(RuntimeError, match="bool"):
                    loss.compute_loss_from_embeddings(columns_of(size, width, count), given)
        else:
            compare(pair("AnglELoss"), columns_of(size, width, count), given)


def test_further_columns_of_cosent_are_ignored(backend: str) -> None:
    first, second, third = columns_of(20, 5, 3)
    labels = torch.rand(20)
    compare(pair("CoSENTLoss"), [first, second, third], labels)
    assert torch.equal(*(losses.CoSENTLoss(Identity()).compute_loss_from_embeddings(x, labels)
                         for x in ([first, second], [first, second, third])))  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_zero_rows_and_strides(name: str, backend: str) -> None:
    first, second = columns_of(70, 6)
    first[3], second[4], first[5], second[5] = 0.0, 0.0, 0.0, 0.0
    labels = torch.randint(5, (140,))
    compare(pair(name), [first, second], labels[::2])
    compare(pair(name), [first.T.contiguous().T, second[:1].expand(70, 6)], labels[::2])


@pytest.mark.parametrize("name", NAMES)
def test_calls_refuse_what_the_oracle_refuses(name: str) -> None:
    a, b = columns_of(4, 3)
    labels = torch.rand(4)
    for embeddings, given, kind, message in (
        ([a], labels, ColumnsError, "expects at least 2 input columns"),
        ([a, b], labels[:3], ShapeError, rf"{name} expects 4 labels \(one per example\), but got 3 labels"),
        ([a, b], torch.rand(4, 2), ShapeError, f"{name} expects 4 labels .* but got 8 labels"),
        ([a, b], None, MissingError, "AnglELoss requires labels for datasets with pairs|CoSENTLoss needs labels"),
        ([a, b[:, :2]], labels, ShapeError, "Rows of a have 3 numbers"),
    ):
        ours, theirs = pair(name)
        with pytest.raises((ValueError, RuntimeError, IndexError, AttributeError)) as expected:
            theirs.compute_loss_from_embeddings(embeddings, given)
        with pytest.raises(kind, match=message) as found:
            ours.compute_loss_from_embeddings(embeddings, given)
        assert isinstance(found.value, type(expected.value))


def test_angle_with_negatives_refuses_labels_that_do_not_fit() -> None:
    for loss in pair("AnglELoss"):
        with pytest.raises(ValueError, match=r"AnglELoss expects 4 labels \(one per example\), but got 3 labels"):
            loss.compute_loss_from_embeddings(columns_of(4, 3, 3), torch.rand(3))


def test_a_similarity_that_is_no_vector_is_refused() -> None:
    for loss in pair("CoSENTLoss", similarity_fct=lambda a, b: a @ b.T):
        with pytest.raises(ValueError, match="Labels and scores must have the same shape"):
            loss.compute_loss_from_embeddings(columns_of(4, 3), torch.rand(4))


def test_labels_without_an_order_are_refused() -> None:
    """The oracle's search makes some number of them."""
    with pytest.raises(InputError, match="labels hold nan"):
        losses.CoSENTLoss(Identity()).compute_loss_from_embeddings(columns_of(2, 3), torch.tensor([0.5, torch.nan]))


def test_wrong_columns_are_not_embedded() -> None:
    class Model(nn.Module):
        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            raise AssertionError("work was done before the error")

    for name in NAMES:
        with pytest.raises(ColumnsError):
            getattr(losses, name)(Model())([{}], torch.rand(3))


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_the_oracles(name: str) -> None:
    for args in ((), (50.0,)):
        loss, theirs = pair(name, *args)
        assert list(loss.get_config_dict().items()) == list(theirs.get_config_dict().items())
        assert re.search(r"@\w+\{(\S+),", loss.citation)[1] == re.search(r"@\w+\{(\S+),", theirs.citation)[1]  # type: ignore[index]
        assert loss.scale == theirs.scale
        assert loss.similarity_fct.__name__ == theirs.similarity_fct.__name__
    assert issubclass(losses.AnglELoss, losses.CoSENTLoss)
    partial = losses.CoSENTLoss(Identity(), similarity_fct=functools.partial(paired.pairwise_cos_sim))
    assert partial.get_config_dict()["similarity_fct"] == "pairwise_cos_sim"


def test_settings_are_read_at_the_call(backend: str) -> None:
    embeddings, labels = columns_of(20, 5), torch.rand(20)
    both = pair("CoSENTLoss")
    for loss in both:
        loss.scale, loss.similarity_fct = 3.0, paired.pairwise_manhattan_sim
    compare(both, embeddings, labels)


def test_a_scale_may_learn(backend: str) -> None:
    found = []
    for loss in pair("CoSENTLoss"):
        loss.scale = torch.tensor(7.0, dtype=torch.double, requires_grad=True)
        loss.compute_loss_from_embeddings(columns_of(20, 5), torch.rand(20, generator=torch.manual_seed(1))).backward()
        found.append(loss.scale.grad)
    torch.testing.assert_close(*found)


def test_copies_compute_the_same() -> None:
    embeddings, labels = columns_of(20, 5), torch.rand(20)
    for name in NAMES:
        loss = getattr(losses, name)(Identity(), 7.0)
        expected = loss.compute_loss_from_embeddings(embeddings, labels)
        for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert torch.equal(other.compute_loss_from_embeddings(embeddings, labels), expected)
