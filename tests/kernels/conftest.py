"""Kernels on a GPU where there is one, else in Triton's interpreter, which wants a process of its own.

Triton settles at import whether it interprets, and other tests' imports bring it in; so `test_in_interpreter.py` runs
this folder once more in a child process with TRITON_INTERPRET=1, and there alone the tests serve CPU tensors.
"""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tileloss
from tileloss.backend import interpreting

os.environ.setdefault("TILELOSS_AUTOTUNE", "0")  # tuning takes seconds a kernel and changes no number

# what needs kernels that run, and what needs kernels that compile
collect_ignore = ["test_in_interpreter.py", "test_compile_report.py"] if interpreting() else []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of this folder that run kernels need a GPU unless they are interpreted."""
    for item in items:
        here = item.path.is_relative_to(Path(__file__).parent)
        if here and not interpreting() and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run in this process."""
    return torch.device("cpu" if interpreting() else "cuda")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The triton backend, with blocks, steps and bands so small that a test's batch has many of each."""
    blocks = importlib.import_module("tileloss.tiled.blocks")
    for kind in ("cpu", "cuda"):
        monkeypatch.setitem(blocks.BLOCK_BYTES, kind, 1)
        monkeypatch.setitem(blocks.MIN_ROWS, kind, 64)
    unit_rows = importlib.import_module("tileloss.kernels.unit_rows")
    monkeypatch.setattr(unit_rows, "_WIDEST_BLOCK", 128)
    normalisers = importlib.import_module("tileloss.kernels.normalisers")
    monkeypatch.setattr(normalisers, "_PARTS_BYTES", 1)
    with tileloss.use_backend("triton"):
        yield
