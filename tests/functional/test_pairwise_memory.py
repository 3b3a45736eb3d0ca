"""Memory: the matrix that was asked for, and little beside it."""

import importlib

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tileloss.functional import pairwise_distance, triplet_masks
from tileloss.metrics import METRICS

SIZE, WIDTH = 1024, 16
BLOCK = 1 << 18
MATRIX = SIZE * SIZE * 4


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importlib.import_module("tileloss.tiled.blocks").BLOCK_BYTES, "cpu", BLOCK)


def peak_bytes(run) -> int:
    """The most that was allocated at one time, what `run` returns included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = run()
    peak = held = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del kept
    return peak


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_forward_and_backward_hold_the_matrix_and_a_few_blocks(metric: str, within: bool) -> None:
    inputs = [torch.randn(SIZE, WIDTH, requires_grad=True) for _ in range(1 if within else 2)]
    weights = torch.randn(SIZE, SIZE)

    def run(backend: str) -> list[torch.Tensor]:
        matrix = pairwise_distance(*inputs, metric=metric, backend=backend)
        return [matrix, *torch.autograd.grad(matrix, inputs, weights)]

    rows = SIZE * WIDTH * 4
    assert peak_bytes(lambda: run("tiled")) <= MATRIX + 4 * BLOCK + 8 * rows
    if metric != "dot":  # whose definition needs nothing else either
        assert peak_bytes(lambda: run("reference")) > 1.9 * MATRIX, "or the measurement sees nothing"


def test_masks_hold_themselves_alone() -> None:
    labels = torch.arange(128) % 8
    masks = 128**3 + 2 * 128**2
    assert peak_bytes(lambda: triplet_masks(labels, triplets=True, backend="tiled")) <= masks + 1024
    assert peak_bytes(lambda: triplet_masks(labels, triplets=True, backend="reference")) > 2 * masks
