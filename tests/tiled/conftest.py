"""Blocks small enough that a test's batch has many."""

import importlib

import pytest


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Cut every walk into blocks of this many rows."""
    rows = 7
    driver = importlib.import_module("tileloss.tiled.contrastive")
    monkeypatch.setitem(driver._BLOCK_BYTES, "cpu", 1)
    monkeypatch.setattr(driver, "_MIN_ROWS", rows)
    return rows
