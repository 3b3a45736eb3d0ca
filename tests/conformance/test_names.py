"""Whatever is imported from sentence-transformers' losses is found in ours at the same place, with the same shape."""

import importlib
import inspect
from types import ModuleType
from typing import Any

from torch import nn

from tileloss import losses


def test_every_name_is_in_the_module_of_its_name(stock: ModuleType) -> None:
    for name in losses.__all__:
        module = getattr(stock, name).__module__.rpartition(".")[2]
        assert getattr(importlib.import_module(f"tileloss.losses.{module}"), name) is getattr(losses, name)


def test_subclasses_are_those_of_the_stock_classes(stock: ModuleType) -> None:
    classes = [name for name in losses.__all__ if inspect.isclass(getattr(losses, name))]
    for package in (stock, losses):
        kinds = {name: getattr(package, name) for name in classes}
        found = {(a, b) for a in classes for b in classes if a != b and issubclass(kinds[a], kinds[b])}
        assert ("BatchHardSoftMarginTripletLoss", "BatchHardTripletLoss") in found
        if package is stock:
            expected = found
    assert found == expected


def _shape(parameter: inspect.Parameter, metrics: dict[Any, str]) -> tuple[str, Any, Any]:
    default = parameter.default
    if not isinstance(default, (type(None), bool, int, float, str, tuple)) and default is not parameter.empty:
        # a function by its name, an object that is shared by all losses by its class
        default = metrics.get(default) or getattr(default, "__name__", type(default).__name__)
    return parameter.name, parameter.kind, default


def _parameters(function: Any, package: ModuleType) -> list[tuple[str, Any, Any]]:
    """Names, kinds and defaults; distances, which have no name in sentence-transformers, by that in their list."""
    lists = [getattr(package, name) for name in ("SiameseDistanceMetric", "TripletDistanceMetric")]
    metrics = {value: f"{kind.__name__}.{key}" for kind in lists for key, value in vars(kind).items() if key.isupper()}
    return [_shape(parameter, metrics) for parameter in inspect.signature(function).parameters.values()]


def test_constructors_take_the_same_in_the_same_order(name: str, stock: ModuleType) -> None:
    """Names, defaults and what may be given by position; parameters of ours come after theirs, by keyword alone."""
    theirs, ours = (_parameters(getattr(package, name).__init__, package) for package in (stock, losses))
    assert ours[: len(theirs)] == theirs
    assert all(kind == inspect.Parameter.KEYWORD_ONLY for _, kind, _ in ours[len(theirs) :])


def test_public_methods_and_properties_are_there_and_take_the_same(name: str, stock: ModuleType) -> None:
    theirs, ours = getattr(stock, name), getattr(losses, name)
    for attribute, value in inspect.getmembers(theirs):
        if attribute.startswith("_") or value is getattr(nn.Module, attribute, None):
            continue
        assert hasattr(ours, attribute), attribute
        if inspect.isfunction(value):
            expected = [parameter[:2] for parameter in _parameters(value, stock)]
            found = [parameter[:2] for parameter in _parameters(getattr(ours, attribute), losses)]
            assert found[: len(expected)] == expected, attribute


def test_all_names_are_here_once_and_no_others(stock: ModuleType) -> None:
    assert sorted(losses.__all__) == sorted(stock.__all__)
