"""Losses rebuilt where they stand: inside wrappers, dicts and each other, and what is left as it is."""

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import tileloss
from tileloss import losses
from tileloss.errors import KindError
from tileloss.integrations import rebuild
from tileloss.similarity import dot_score


@pytest.fixture
def stock() -> ModuleType:
    return pytest.importorskip("sentence_transformers.sentence_transformer.losses")


@pytest.fixture
def model(tiny_encoder: Callable[..., Any]) -> Any:
    return tiny_encoder().double().eval()


@pytest.fixture
def value(model: Any, texts: Callable[..., list[str]]) -> Callable[[Any], list[Any]]:
    """The value of a loss and the gradients of its model, on a batch of pairs."""

    def value(loss: Any) -> list[Any]:
        model.zero_grad()
        found = loss([model.preprocess(texts(6, seed=column)) for column in range(2)], None)
        found.backward()
        return [found.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    return value


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected) > 1
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-8 * (b.norm() + 1e-3)


class Wrapper(nn.Module):
    """A user's own combination of losses."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.first, self.rest = parts[0], nn.ModuleList(parts[1:])

    def forward(self, features: Any, labels: Any) -> Any:
        return sum((part(features, labels) for part in self.rest), self.first(features, labels))


def test_losses_inside_a_users_module_are_replaced_there(stock: ModuleType, model: Any, value: Any) -> None:
    wrapper = Wrapper(
        stock.MegaBatchMarginLoss(model, use_mini_batched_version=False),
        nn.ModuleDict({"a": stock.MultipleNegativesRankingLoss(model)}),
    )
    wrapper.forward = lambda *batch: wrapper.first(*batch) + 2 * wrapper.rest[0]["a"](*batch)  # type: ignore[assignment]
    expected = value(wrapper)
    assert tileloss.accelerate(wrapper) is wrapper
    assert type(wrapper.first) is losses.MegaBatchMarginLoss
    assert type(wrapper.rest[0]["a"]) is losses.MultipleNegativesRankingLoss
    assert_same(value(wrapper), expected)


def test_one_loss_in_two_places_stays_one(stock: ModuleType, model: Any) -> None:
    shared = stock.MultipleNegativesRankingLoss(model)
    rebuilt = tileloss.accelerate({"a": shared, "b": [shared, Wrapper(shared)]})
    assert type(rebuilt["a"]) is losses.MultipleNegativesRankingLoss
    assert rebuilt["b"][0] is rebuilt["a"] is rebuilt["b"][1].first


@pytest.mark.parametrize("inner", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_nested_losses_are_replaced_at_every_depth(stock: ModuleType, model: Any, value: Any, inner: str) -> None:
    """Also where a stock MatryoshkaLoss has changed the loss inside it, a cached one, for good."""
    options = {"mini_batch_size": 4} if inner.startswith("Cached") else {}
    nested = stock.MatryoshkaLoss(model, getattr(stock, inner)(model, scale=7.0, **options), [16, 8], [1.0, 0.5])
    expected = value(nested)
    rebuilt = tileloss.accelerate(nested)
    assert type(rebuilt) is losses.MatryoshkaLoss
    assert type(rebuilt.loss) is getattr(losses, inner)
    assert rebuilt.loss.scale == 7.0
    assert_same(value(rebuilt), expected)
    assert_same(value(nested), expected)  # the old one still works


def test_a_loss_that_a_stock_wrapper_has_changed_is_left_when_it_is_not_in_it(
    stock: ModuleType, model: Any, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """By itself it still computes several widths, whichever of the two is met first."""
    inner = stock.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)
    nested = stock.MatryoshkaLoss(model, inner, [16, 8])
    expected = value(inner)
    for order in (["nested", "inner"], ["inner", "nested"]):
        both = {"nested": nested, "inner": inner}
        rebuilt = tileloss.accelerate({key: both[key] for key in order})
        assert rebuilt["inner"] is inner
        assert "calculate_loss was replaced" in caplog.text
        assert_same(value(rebuilt["inner"]), expected)
        assert_same(value(rebuilt["nested"]), expected)


def test_subclasses_are_left_and_named_and_their_children_replaced(
    stock: ModuleType, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Doubled(stock.MultipleNegativesRankingLoss):  # type: ignore[misc, name-defined]
        def compute_loss_from_embeddings(self, embeddings: Any, labels: Any = None) -> Any:
            return 2 * super().compute_loss_from_embeddings(embeddings, labels)

    inner = Doubled(model)
    outer = stock.MatryoshkaLoss(model, inner, [16])
    rebuilt = tileloss.accelerate(outer)
    assert type(rebuilt) is losses.MatryoshkaLoss
    assert rebuilt.loss is inner
    assert "left loss.loss as it is: Doubled is a subclass of MultipleNegativesRankingLoss" in caplog.text
    assert "replaced MatryoshkaLoss at loss." in caplog.text


def test_a_wrapper_around_a_changed_loss_that_cannot_be_rebuilt_is_left_too(stock: ModuleType, model: Any) -> None:
    """Ours would cut to each width a second time."""

    class Mine(stock.CachedMultipleNegativesRankingLoss):  # type: ignore[misc, name-defined]
        pass

    outer = stock.MatryoshkaLoss(model, Mine(model), [16, 8])
    assert tileloss.accelerate(outer) is outer


def test_objects_with_methods_of_their_own_and_compiled_ones_are_left(
    stock: ModuleType, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    loss = stock.MultipleNegativesRankingLoss(model)
    loss.forward = lambda features, labels: torch.zeros(())
    assert tileloss.accelerate(loss) is loss
    assert "its method forward was replaced" in caplog.text
    compiled = stock.MultipleNegativesRankingLoss(model)
    compiled.compile(backend="eager")
    assert tileloss.accelerate(compiled) is compiled
    assert "compile it" in caplog.text


def test_sparse_losses_are_left(stock: ModuleType, model: Any) -> None:
    from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss

    loss = SparseMultipleNegativesRankingLoss(model)
    assert tileloss.accelerate(loss) is loss


def test_settings_changed_since_hooks_and_further_attributes_come_along(
    stock: ModuleType, model: Any, value: Any
) -> None:
    loss = stock.MultipleNegativesRankingLoss(model)
    loss.scale, loss.note = 3.0, "mine"
    loss.similarity_fct = dot_score
    calls: list[str] = []
    handle = loss.register_forward_hook(lambda *_: calls.append("hook"))
    loss.train(False)
    model.train()
    expected = value(loss.eval())
    new = tileloss.accelerate(loss)
    assert (new.scale, new.note, new.similarity_fct, new.training) == (3.0, "mine", dot_score, False)
    assert_same(value(new), expected)
    assert calls == ["hook"] * 2
    handle.remove()
    value(new)
    assert len(calls) == 2


def test_a_classifier_that_was_trained_is_shared_and_no_random_number_drawn(stock: ModuleType, model: Any) -> None:
    if not hasattr(losses, "SoftmaxLoss"):
        pytest.skip("tileloss has no SoftmaxLoss")
    loss = stock.SoftmaxLoss(model, 16, 3)
    state = torch.get_rng_state()
    assert tileloss.accelerate(loss).classifier is loss.classifier
    assert torch.equal(torch.get_rng_state(), state)


def test_settings_that_come_out_differently_are_noticed(
    stock: ModuleType, model: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rebuild._ATTRIBUTES, "positive_margin", ("negative_margin",))
    loss = stock.MegaBatchMarginLoss(model)
    assert tileloss.accelerate(loss).get_config_dict() == loss.get_config_dict()  # set again from the object itself
    monkeypatch.setattr(losses.MegaBatchMarginLoss, "get_config_dict", lambda self: {})
    assert tileloss.accelerate(loss) is loss
    assert "other settings" in caplog.text


def test_what_is_no_loss_is_refused(stock: ModuleType) -> None:
    for wrong in (stock.MultipleNegativesRankingLoss, lambda model: model, 3.0, {"a": "b"}):
        with pytest.raises(KindError, match="accelerate takes a loss"):
            tileloss.accelerate(wrong)


def test_what_holds_no_stock_loss_is_given_back(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    loss = losses.MultipleNegativesRankingLoss(model)
    assert tileloss.accelerate(loss) is loss
    with caplog.at_level(logging.WARNING):
        assert tileloss.accelerate(model) is model
    assert "replaced nothing" in caplog.text


def test_settings_that_cannot_be_read_back_are_said(
    stock: ModuleType, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    loss = stock.MegaBatchMarginLoss(model)
    del loss.positive_margin
    assert tileloss.accelerate(loss) is loss
    assert "its argument 'positive_margin' cannot be read back" in caplog.text


def test_settings_that_ours_refuses_are_said(stock: ModuleType, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    loss = stock.MultipleNegativesRankingLoss(model)
    loss.scale = -1.0
    assert tileloss.accelerate(loss) is loss
    assert "tileloss does not take its settings: Scale must be a positive value." in caplog.text


def test_a_loss_made_before_a_patch_is_rebuilt_while_it_holds(stock: ModuleType, model: Any, value: Any) -> None:
    loss = stock.MultipleNegativesRankingLoss(model)
    with tileloss.patch_sentence_transformers():
        made = stock.MultipleNegativesRankingLoss(model)
        assert tileloss.accelerate(made) is made
        new = tileloss.accelerate(loss)
        assert type(new) is type(made) is losses.MultipleNegativesRankingLoss
        assert_same(value(new), value(loss))
