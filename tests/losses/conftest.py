"""The backends that run everywhere, cut into blocks small enough that a test's batch has many."""

import importlib
from typing import Any

import pytest

import tileloss


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Cut every walk into blocks of this many rows."""
    rows = 7
    driver = importlib.import_module("tileloss.tiled.contrastive")
    monkeypatch.setitem(driver._BLOCK_BYTES, "cpu", 1)
    monkeypatch.setattr(driver, "_MIN_ROWS", rows)
    return rows


@pytest.fixture(params=["reference", "tiled"])
def backend(request: pytest.FixtureRequest, small_blocks: int) -> Any:
    """Each of the backends that need no GPU, forced for the length of the test."""
    with tileloss.use_backend(request.param):
        yield request.param
