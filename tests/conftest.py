"""What test files share: GPU tests only where there is a GPU, the backends that run everywhere, poisoned memory."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tileloss


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked `gpu` on a machine without one; pytest counts them as deselected."""
    if torch.cuda.is_available() or torch.xpu.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Cut every walk into blocks of this many rows."""
    rows = 7
    blocks = importlib.import_module("tileloss.tiled.blocks")
    monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", 1)
    monkeypatch.setattr(blocks, "MIN_ROWS", rows)
    return rows


@pytest.fixture(params=["reference", "tiled"])
def backend(request: pytest.FixtureRequest, small_blocks: int) -> Any:
    """Each of the backends that need no GPU, forced for the length of the test."""
    with tileloss.use_backend(request.param):
        yield request.param


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with what no computation survives unnoticed: NaN, or an integer that is out of range as an index."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let freshly allocated tensors hold poison instead of whatever the memory held before.

    A kernel that reads what nobody wrote then gives NaN every time, not garbage once in a while.
    """

    def poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            with torch.no_grad():
                return _poison(allocate(*args, **kwargs)).requires_grad_(kwargs.get("requires_grad", False))

        return allocate_poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoning(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoning(getattr(torch.Tensor, name)))
