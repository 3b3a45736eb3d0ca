"""How much is drawn: little and always the same in the tests, much and ever different in `make fuzz`."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

from tileloss.backend import interpreting

from .judge import DEVICE

os.environ.setdefault("TILELOSS_AUTOTUNE", "0")  # tuning takes seconds a kernel and changes no number

settings.register_profile(
    "ci", deadline=None, max_examples=40, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
# a call in the interpreter takes a second, and to shrink one takes minutes
settings.register_profile("interpreter", settings.get_profile("ci"), max_examples=6, phases=[Phase.generate])
settings.register_profile(
    "fuzz", settings.get_profile("ci"), derandomize=False, max_examples=int(os.environ.get("FUZZ_EXAMPLES") or 1000)
)
settings.load_profile("interpreter" if interpreting() else "ci")  # `--hypothesis-profile` comes later and wins

collect_ignore = ["test_in_interpreter.py"] if interpreting() else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, its kernels are what these tests judge."""
    for item in items:
        if DEVICE == "cuda" and item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)


# blocks of seven rows, or of a few
_BLOCKS = [
    ("blocks", "MIN_ROWS", 7),
    ("blocks", "BLOCK_BYTES", 1),
    ("dispersion", "_PREPARED_BYTES", 1),
    ("matryoshka", "_PART_BYTES", 256),
    ("pair_classifier", "_BLOCK_BYTES", 256),
    ("pairs", "_BLOCK_BYTES", 256),
    ("prefix_cosines", "_PART_BYTES", 256),
    ("similarity", "PAIRED_ROWS", 7),
    ("similarity", "_PAIRED_BLOCK", 3),
    ("chosen_pairs", "_ROWS_AT_ONCE", 7),
]


@pytest.fixture(scope="module", autouse=True)
def _small_blocks() -> Iterator[None]:
    """Blocks so small that a batch has several."""
    with pytest.MonkeyPatch.context() as patch:
        for name, constant, bytes_or_rows in _BLOCKS:
            module = importlib.import_module(f"tileloss.tiled.{name}")
            value = getattr(module, constant)
            small = dict.fromkeys(value, bytes_or_rows) if isinstance(value, dict) else bytes_or_rows
            patch.setattr(module, constant, small)
        yield
