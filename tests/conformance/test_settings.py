"""Settings, attributes and citations as model cards, callbacks and scripts read them."""

import re
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import tileloss
from tileloss import losses

WITHOUT_CITATION = {"CosineSimilarityLoss", "OnlineContrastiveLoss", "CachedGISTEmbedLoss"}


def _comparable(value: Any) -> Any:
    """Functions by name and modules by class, because each library has its own."""
    if isinstance(value, nn.Module):
        return type(value).__name__
    if callable(value):
        name = getattr(value, "__name__", type(value).__name__)
        return None if name == "<lambda>" else name  # a distance of a list, which the configuration names
    return value


def test_configuration_temperature_and_citation(name: str, stock: ModuleType, make: Callable[..., Any]) -> None:
    """The same keys and values in the same order; the same papers."""
    theirs, ours = make(stock, name), make(losses, name)
    settings = [
        [(key, _comparable(value)) for key, value in loss.get_config_dict().items()] for loss in (theirs, ours)
    ]
    assert settings[1] == settings[0]
    assert getattr(ours, "temperature", None) == getattr(theirs, "temperature", None)
    assert hasattr(ours, "citation") == hasattr(theirs, "citation") == (name not in WITHOUT_CITATION)
    if name not in WITHOUT_CITATION:
        keys = [re.findall(r"@\w+\{([^,]+),", loss.citation) for loss in (theirs, ours)]
        assert keys[0] == keys[1] != []


def test_attributes_have_the_same_names_and_values(name: str, stock: ModuleType, make: Callable[..., Any]) -> None:
    theirs, ours = make(stock, name), make(losses, name)
    own = set(vars(nn.Module()))
    public = [key for key in {**vars(theirs), **theirs._modules} if key not in own and not key.startswith("_")]
    for key in (key for key in public if key not in ("forward", "calculate_loss")):
        expected, found = getattr(theirs, key), getattr(ours, key)
        if not hasattr(expected, "get_vocab") and _comparable(expected) is not None:  # no tokenizer
            assert _comparable(found) == _comparable(expected), key
    assert {key for key, _ in theirs.named_parameters()} == {key for key, _ in ours.named_parameters()}
    assert theirs.state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize(
    ("kind", "metrics", "columns"),
    [
        ("ContrastiveLoss", "SiameseDistanceMetric", 2),
        ("OnlineContrastiveLoss", "SiameseDistanceMetric", 2),
        ("TripletLoss", "TripletDistanceMetric", 3),
        ("BatchHardTripletLoss", "BatchHardTripletLossDistanceFunction", 1),
        ("BatchAllTripletLoss", "BatchHardTripletLossDistanceFunction", 1),
    ],
)
def test_stock_distances_are_known_and_named(
    kind: str, metrics: str, columns: int, stock: ModuleType, make: Callable[..., Any]
) -> None:
    """They stay in scripts whose losses are ours: the same value as from our own, and no warning of a slower path."""
    torch.manual_seed(0)
    embeddings = [torch.randn(12, 5, dtype=torch.float64) for _ in range(columns)]
    labels = torch.arange(12) % 2
    names = [name for name in vars(getattr(stock, metrics)) if not name.startswith("_")]
    assert len(names) >= 2
    for name in names:
        theirs, ours = (getattr(getattr(package, metrics), name) for package in (stock, losses))
        values = []
        for metric in (theirs, ours):
            loss = make(losses, kind, nn.Identity(), distance_metric=metric)
            with warnings.catch_warnings(), tileloss.use_backend("tiled"):
                warnings.simplefilter("error")
                values.append(loss.compute_loss_from_embeddings(embeddings, labels))
            assert loss.get_config_dict() == make(stock, kind, nn.Identity(), distance_metric=theirs).get_config_dict()
        assert values[0] == values[1]
