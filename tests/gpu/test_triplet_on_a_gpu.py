"""What only a GPU can show of mined triplets: full tiles, memory, silence towards the host, sizes, repeatability.

Exactness pass by pass is in tests/kernels, which runs there too.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import tileloss
from tileloss.functional import triplet_loss, triplet_loss_with_stats

pytestmark = pytest.mark.gpu

MINING = ["all", "semi_hard", "hard"]
DISTANCES = ["euclidean", "squared_euclidean", "cosine"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    torch.cuda.empty_cache()
    with tileloss.use_backend("triton"):
        yield


def batch(size: int, width: int, dtype: torch.dtype, each: int) -> tuple[Tensor, Tensor]:
    """Embeddings around the centres of their classes, of `each` rows, as a leaf; and labels."""
    generator = torch.Generator("cuda").manual_seed(0)
    labels = torch.randperm(size, device="cuda", generator=generator) // each
    centres = torch.randn(size // each + 1, width, device="cuda", generator=generator)
    x = centres[labels] + torch.randn(size, width, device="cuda", generator=generator)
    return x.to(dtype).requires_grad_(), labels


def value_and_gradient(x: Tensor, labels: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    loss = triplet_loss(x, labels, **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("each", [8, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("mining", MINING)
def test_sizes_that_fit_no_tile(mining: str, distance: str, dtype: torch.dtype, each: int) -> None:
    """Full-size tiles, against float64. Slopes and gradients rounded to the dtype are the largest error."""
    x, labels = batch(1501, 200, dtype, each)
    margin = 0.2 if distance == "cosine" else 5.0
    if distance == "cosine":  # of short rows, whose gradients are not too small for float16
        x = (x.detach() / 256).requires_grad_()
    exact = x.detach().double().requires_grad_()
    truth = value_and_gradient(exact, labels, mining=mining, distance=distance, margin=margin, backend="tiled")
    found = value_and_gradient(x, labels, mining=mining, distance=distance, margin=margin)
    assert error(found[0], truth[0]) < 1e-4
    # near ties may go the other way, each of which moves one row's gradient
    rounding = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]
    assert error(found[1], truth[1]) < rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mining", MINING)
def test_two_runs_give_the_same_bits(mining: str, dtype: torch.dtype) -> None:
    x, labels = batch(5000, 384, dtype, 50)
    first, second = (value_and_gradient(x, labels, mining=mining) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mining", MINING)
def test_large_batches_stay_within_700_megabytes(mining: str) -> None:
    """Beside the embeddings and their gradient, where the distances alone would be 4 GB."""
    x, labels = batch(32_768, 768, torch.bfloat16, 8)
    triplet_loss(x[:2048], labels[:2048], mining=mining).backward()  # whatever libraries set up once
    x.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    triplet_loss(x, labels, mining=mining).backward()
    assert torch.cuda.max_memory_allocated() - before - x.nbytes <= 700e6


@contextmanager
def no_host_waits() -> Iterator[None]:
    """PyTorch raises where the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mining", MINING)
def test_the_host_never_waits(mining: str) -> None:
    x, labels = batch(2048, 128, torch.bfloat16, 8)

    def step() -> None:
        loss, stats = triplet_loss_with_stats(x, labels, mining=mining)
        (loss + 0 * stats.active_share).backward()

    step()
    with no_host_waits():
        step()


@pytest.mark.parametrize("mining", MINING)
def test_more_pairs_than_32_bits_count(mining: str) -> None:
    size = 50_000
    assert size * size > 2**31
    x, labels = batch(size, 16, torch.float32, 8)
    found = value_and_gradient(x, labels, mining=mining)
    expected = value_and_gradient(x, labels, mining=mining, backend="tiled")
    assert error(found[0], expected[0].double()) < 1e-4
    assert error(found[1], expected[1].double()) < 5e-3


def test_more_triplets_than_32_bits_count() -> None:
    x, labels = batch(4096, 32, torch.float32, 1024)
    _, stats = triplet_loss_with_stats(x, labels, margin=1e4)
    assert stats.active == 4096 * 1023 * 3072
    assert stats.active > 2**31


@pytest.mark.parametrize("mining", MINING)
def test_one_graph_under_compile(mining: str) -> None:
    def step(weight: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        return triplet_loss((x @ weight).tanh(), labels, mining=mining)

    weight = torch.randn(64, 96, device="cuda", requires_grad=True)
    x, labels = torch.randn(1500, 64, device="cuda"), torch.arange(1500, device="cuda") // 4
    compiled = torch.compile(step, fullgraph=True)
    (found,), (expected,) = (torch.autograd.grad(run(weight, x, labels), weight) for run in (compiled, step))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
