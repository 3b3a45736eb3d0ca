"""Mined triplets as a node of autograd's graph, whole under torch.compile, in bounded memory."""

import importlib

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tileloss.functional import triplet_loss, triplet_loss_with_stats
from tileloss.functional.triplet import MINING
from tileloss.tiled import triplet as tiled

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def batch(size: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(size, width, dtype=torch.float64, requires_grad=True), torch.arange(size) % classes


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine"])
@pytest.mark.parametrize("margin", [0.3, "soft"])
def test_second_derivatives(mining: str, distance: str, margin: float | str, backend: str) -> None:
    embeddings, labels = batch(9, 4, 3)

    def loss(x: Tensor) -> Tensor:
        return triplet_loss(x, labels, mining=mining, margin=margin, distance=distance)

    assert torch.autograd.gradcheck(loss, embeddings)
    assert torch.autograd.gradgradcheck(loss, embeddings)


def test_second_derivatives_do_not_flow_on_twice(backend: str) -> None:
    weight, labels = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.arange(8) % 3
    inputs = torch.randn(8, 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda w: triplet_loss((inputs @ w).tanh(), labels, mining="semi_hard"), weight
    )


@pytest.mark.parametrize("mining", MINING)
def test_backward_twice_scaled_and_not_at_all(mining: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, labels = batch(20, 4, 4)
    loss = triplet_loss(embeddings, labels, mining=mining)
    first, second = (torch.autograd.grad(3 * loss, embeddings, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, 3 * torch.autograd.grad(loss, embeddings)[0])
    plain = triplet_loss(embeddings.detach(), labels, mining=mining)
    assert not plain.requires_grad
    torch.testing.assert_close(plain, loss.detach())
    monkeypatch.setattr("tileloss.tiled.distance.SquaredEuclideanDistance.pull", None)
    with torch.no_grad():
        triplet_loss(embeddings, labels, mining=mining)


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("size", [20, 300])
def test_one_graph_with_the_same_numbers(mining: str, size: int) -> None:
    torch.compiler.reset()
    embeddings, labels = batch(size, 4, 6)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        loss, stats = triplet_loss_with_stats(x.tanh(), labels, mining=mining, margin=0.3)
        return 2 * loss, *stats

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = compiled(embeddings), step(embeddings)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x[0], embeddings)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mining", MINING)
def test_opcheck(mining: str, dtype: torch.dtype, need: bool) -> None:
    embeddings, labels = batch(9, 4, 3)
    arguments = (embeddings.detach().to(dtype).requires_grad_(need), labels, mining, 0.3, False, "euclidean", need)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(torch.ops.tileloss.triplet.default, (*arguments, "tiled"), test_utils=CHECKS, **tolerance)


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("classes", [4, 512])
def test_memory_is_bounded_by_blocks(mining: str, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block = 1 << 20
    monkeypatch.setitem(importlib.import_module("tileloss.tiled.blocks").BLOCK_BYTES, "cpu", block)
    monkeypatch.setattr(importlib.import_module("tileloss.tiled.mining"), "_PART", block // 4)
    size = 2048
    embeddings, labels = torch.randn(size, 8, requires_grad=True), torch.arange(size) % classes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        triplet_loss(embeddings, labels, mining=mining, backend="tiled").backward()
    peak = held = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak < 14 * block, "a matrix of distances alone has 16"


def test_the_walk_is_asked_for_no_gradient_that_nobody_wants() -> None:
    embeddings, labels = batch(20, 4, 4)
    for mining in MINING:
        found = tiled.triplet_loss(embeddings.detach(), labels, mining, 0.3, False, "cosine", False)
        assert found.d_embeddings is None
