"""Memory: the blocks are bounded, so what a call takes beside its inputs grows with the batch, not with its square."""

import importlib

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tileloss.functional import contrastive_loss
from tileloss.spec import DIRECTIONS

WIDTH = 8
BLOCK = 1 << 20


@pytest.fixture(autouse=True)
def _blocks_of_a_megabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importlib.import_module("tileloss.tiled.blocks").BLOCK_BYTES, "cpu", BLOCK)


def peak_bytes(size: int, backend: str, **options: object) -> int:
    """The most that was allocated at one time during a forward and a backward, beside the inputs."""
    queries, docs = (torch.randn(size, WIDTH, requires_grad=True) for _ in range(2))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        contrastive_loss(queries, docs, backend=backend, **options).backward()  # type: ignore[arg-type]
    peak = held = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hardness": ("in_batch_negatives", 3.0)},
        {"directions": ("query_to_doc", "doc_to_query"), "partition": "per_direction"},
        {"directions": DIRECTIONS},
        {"similarity": "euclidean"},
    ],
    ids=["default", "hardness", "symmetric", "four directions", "euclidean"],
)
def test_peak_is_bounded_by_blocks(options: dict) -> None:
    small, large = (peak_bytes(size, "tiled", **options) for size in (2048, 4096))
    # distances, and the weights that turn them into gradients, are kept beside their block
    blocks = 5 if options.get("similarity") == "euclidean" else 2
    rows = 4096 * WIDTH * 4
    assert large < blocks * BLOCK + 16 * rows
    assert large < 2.1 * small
    matrix = 4096 * 4096 * 4
    assert large < matrix / 8
    assert peak_bytes(4096, "reference", **options) > 2 * matrix, "or the measurement sees nothing"


def test_exclusion_by_ids_makes_no_matrix() -> None:
    """The mask that ids mean exists for a block at a time; a boolean byte each is all that it adds."""
    plain = peak_bytes(4096, "tiled")
    with_ids = peak_bytes(4096, "tiled", exclude=torch.arange(4096) // 2)
    assert with_ids < plain + BLOCK


def test_no_grad_holds_less_than_training() -> None:
    queries, docs = torch.randn(4096, WIDTH), torch.randn(4096, WIDTH)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace, torch.no_grad():
        contrastive_loss(queries, docs, backend="tiled")
    largest = max(e.nbytes() for e in trace.profiler.kineto_results.events() if e.name() == "[memory]")
    assert largest <= BLOCK
