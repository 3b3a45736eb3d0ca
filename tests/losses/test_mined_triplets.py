"""The four losses that mine triplets, class against class with sentence-transformers'."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tileloss import losses
from tileloss.errors import InputError

oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

NAMES = (
    "BatchAllTripletLoss",
    "BatchHardTripletLoss",
    "BatchHardSoftMarginTripletLoss",
    "BatchSemiHardTripletLoss",
)
OLDER_NAMES = {
    "BatchAllTripletLoss": "batch_all_triplet_loss",
    "BatchHardTripletLoss": "batch_hard_triplet_loss",
    "BatchHardSoftMarginTripletLoss": "batch_hard_triplet_soft_margin_loss",
    "BatchSemiHardTripletLoss": "batch_semi_hard_triplet_loss",
}


class Encoder(nn.Module):
    """A linear layer in the place of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5, dtype=torch.float64)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "sentence_embedding": self.layer(features["x"])}


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Our loss and the stock one, over equal models."""
    torch.manual_seed(0)
    first = getattr(losses, name)(Encoder(), *args, **kwargs)
    torch.manual_seed(0)
    return first, getattr(oracle, name)(Encoder(), *args, **kwargs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("distance", ["euclidean_distance", "cosine_distance", "squared", "own"])
def test_same_value_and_gradients(name: str, distance: str, backend: str) -> None:
    stock = oracle.BatchHardTripletLossDistanceFunction
    metric = {
        "squared": functools.partial(stock.euclidean_distance, squared=True),
        "own": lambda e: torch.cdist(e, e, p=1.0),
    }.get(distance) or getattr(stock, distance)
    if distance == "own" and backend != "reference":
        pytest.skip("a callable of the user's has no blocks")
    ours, theirs = pair(name, metric)
    features, labels = [{"x": torch.randn(50, 6, dtype=torch.float64)}], torch.arange(50) % 7
    found, expected = ours(features, labels), theirs(features, labels)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0.0)
    found.backward()
    expected.backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        # of a bias nothing but rounding is left by differences
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10)
    assert ours.stats.active > 0
    embeddings = theirs.sentence_embedder(features[0])["sentence_embedding"].detach()
    older = getattr(ours, OLDER_NAMES[name])(labels[:, None], embeddings)
    torch.testing.assert_close(older, expected.detach(), rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_configuration_citation_and_attributes(name: str) -> None:
    for options in ({}, {} if "Soft" in name else {"margin": 0.2}):
        ours, theirs = pair(name, **options)
        assert ours.get_config_dict() == theirs.get_config_dict()
        assert ours.citation.split() == theirs.citation.split()
        for attribute in ("margin", "triplet_margin"):
            assert getattr(ours, attribute, None) == getattr(theirs, attribute, None)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        assert isinstance(ours, losses.BatchHardTripletLoss) == isinstance(theirs, oracle.BatchHardTripletLoss)


@pytest.mark.parametrize("name", NAMES)
def test_errors(name: str) -> None:
    ours, theirs = pair(name)
    embeddings = torch.randn(4, 5)
    for labels, kind in ((torch.zeros(3), ValueError), (torch.zeros(4, 2), ValueError), (None, AttributeError)):
        for loss in (ours, theirs):
            with pytest.raises(kind) as error:
                loss.compute_loss_from_embeddings([embeddings], labels)
            if kind is ValueError:
                assert f"{name} expects 4 labels (one per example), but got {labels.numel()}" in str(error.value)
    with pytest.raises(TypeError):
        ours(iter([{"x": embeddings}]), torch.zeros(4))
    with pytest.raises(InputError):
        ours.compute_loss_from_embeddings([torch.zeros(0, 5)], torch.zeros(0))


@pytest.mark.parametrize("squared", [False, True])
def test_distance_functions(squared: bool) -> None:
    ours, theirs = losses.BatchHardTripletLossDistanceFunction, oracle.BatchHardTripletLossDistanceFunction
    x = torch.randn(9, 5, dtype=torch.float64)
    torch.testing.assert_close(ours.euclidean_distance(x, squared), theirs.euclidean_distance(x, squared))
    torch.testing.assert_close(ours.eucledian_distance(x), theirs.eucledian_distance(x))
    torch.testing.assert_close(ours.cosine_distance(x), theirs.cosine_distance(x))


def test_static_helpers() -> None:
    ours, theirs = losses.BatchHardTripletLoss, oracle.BatchHardTripletLoss
    labels = torch.tensor([3, 1, 3, 2, 1, 3])
    for helper in ("get_triplet_mask", "get_anchor_positive_triplet_mask", "get_anchor_negative_triplet_mask"):
        found, expected = getattr(ours, helper)(labels), getattr(theirs, helper)(labels)
        assert found.dtype == torch.bool
        assert torch.equal(found, expected)
    data, mask = torch.randn(5, 6), torch.rand(5, 6) < 0.5
    arguments = data, mask
    torch.testing.assert_close(
        losses.BatchSemiHardTripletLoss._masked_maximum(*arguments),
        oracle.BatchSemiHardTripletLoss._masked_maximum(*arguments),
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_wrapped_model_takes_the_embedders_place(name: str, tiny_encoder: Any) -> None:
    """What sentence-transformers' trainer does with a wrapper, found by the name `model`; saved states keep theirs."""
    from sentence_transformers.base.trainer import BaseTrainer

    model = tiny_encoder()
    loss = getattr(losses, name)(model)
    states = list(loss.state_dict())
    assert all(state.startswith("sentence_embedder.") for state in states)
    assert loss.model is model
    wrapped = nn.ModuleDict({"module": model})
    assert BaseTrainer.override_model_in_loss(None, loss, wrapped) is loss
    assert loss.model is loss.sentence_embedder is wrapped
    assert list(loss.state_dict()) == [s.replace("sentence_embedder.", "sentence_embedder.module.") for s in states]
    outer = nn.Sequential(getattr(losses, name)(model))
    BaseTrainer.override_model_in_loss(_Overrider(), outer, wrapped)
    assert outer[0].sentence_embedder is wrapped


class _Overrider:
    """What the method needs of a trainer: itself."""

    def override_model_in_loss(self, loss: nn.Module, model: nn.Module) -> nn.Module:
        from sentence_transformers.base.trainer import BaseTrainer

        return BaseTrainer.override_model_in_loss(self, loss, model)
