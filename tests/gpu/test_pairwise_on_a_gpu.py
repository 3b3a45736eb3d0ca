"""What only a GPU can show of the matrices and masks: full-size tiles, 64-bit offsets, memory, silence, the tuner.

Exactness over every metric and odd shape is in tests/kernels, which runs there too.
"""

import os

os.environ.setdefault("TILELOSS_AUTOTUNE", "0")  # tuning takes seconds a kernel

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import tileloss
from tileloss import reference
from tileloss.functional import pairwise_distance, triplet_masks
from tileloss.metrics import METRICS

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    torch.cuda.empty_cache()
    with tileloss.use_backend("triton"):
        yield


def rows(size: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(size, width, device="cuda", generator=generator).to(dtype).requires_grad_()


def with_gradients(weights: Tensor, *inputs: Tensor, **options: str) -> list[Tensor]:
    matrix = pairwise_distance(*inputs, **options)
    return [matrix.detach(), *torch.autograd.grad(matrix, inputs, weights.to(matrix.dtype))]


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_sizes_that_fit_no_tile(metric: str, dtype: torch.dtype, within: bool) -> None:
    inputs = [rows(1001, 200, dtype)] + [rows(1501, 200, dtype, seed=1)] * (not within)
    weights = torch.randn(1001, 1001 if within else 1501, device="cuda")
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = with_gradients(weights, *exact, metric=metric, backend="tiled")
    found = with_gradients(weights, *inputs, metric=metric)
    assert error(found[0], truth[0]) < 1e-5
    for ours, expected in zip(found[1:], truth[1:], strict=True):
        assert error(ours, expected) < ROUNDING[dtype]
    again = with_gradients(weights, *inputs, metric=metric)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.parametrize("metric", ["euclidean", "squared_euclidean"])
def test_distances_keep_their_digits_where_float32_may_be_narrowed(metric: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        x = rows(1000, 384, torch.float32)
        near = (x + 0.05 * rows(1000, 384, torch.float32, seed=1)).detach()
        found = pairwise_distance(x, near, metric=metric).diagonal()
        truth = pairwise_distance(x.double(), near.double(), metric=metric, backend="tiled").diagonal()
        assert error(found, truth) < 1e-3
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("metric", METRICS)
def test_no_second_matrix(metric: str) -> None:
    x = rows(8192, 256, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    matrix = pairwise_distance(x, metric=metric)
    matrix.sum().backward()  # whose gradient is one number, expanded
    assert torch.cuda.max_memory_allocated() - before <= matrix.nbytes + 8 * x.nbytes


@pytest.mark.parametrize("metric", METRICS)
def test_the_host_never_waits(metric: str) -> None:
    def step() -> None:
        pairwise_distance(rows(500, 64, torch.bfloat16), metric=metric).sum().backward()
        triplet_masks(labels, triplets=True)

    labels = torch.arange(100, device="cuda") // 4
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("metric", METRICS)
def test_more_entries_than_32_bits_count(metric: str) -> None:
    size = 47_000
    assert size * size > 2**31
    x = rows(size, 16, torch.float16)
    matrix = pairwise_distance(x, metric=metric)
    expected = pairwise_distance(
        x[-500:].detach().double(), x[-300:].detach().double(), metric=metric, backend="tiled"
    )
    torch.testing.assert_close(matrix[-500:, -300:].detach().double(), expected, rtol=1e-3, atol=1e-3)
    weights = torch.zeros((), device="cuda").expand(size, size)
    (gradient,) = torch.autograd.grad(matrix, x, weights)
    assert not gradient.any()


@pytest.mark.parametrize("triplets", [False, True])
def test_masks_of_more_entries_than_32_bits_count(triplets: bool) -> None:
    size = 1301 if triplets else 47_001
    labels = torch.arange(size, device="cuda") // 8
    found = triplet_masks(labels, triplets=triplets)
    assert int(found.anchor_positive.sum()) == size // 8 * 56 + (size % 8) * (size % 8 - 1)
    if found.triplet is not None:
        assert found.triplet.numel() > 2**31
        assert torch.equal(
            found.triplet[-1], reference.triplet_masks(labels, False)[0][-1, :, None] & found.anchor_negative[-1]
        )


def test_one_graph_under_compile() -> None:
    x = rows(1100, 64, torch.float32)
    compiled = torch.compile(lambda x: pairwise_distance(x).square().mean(), fullgraph=True)
    (found,), (expected,) = (
        torch.autograd.grad(run(x), x) for run in (compiled, lambda x: pairwise_distance(x).square().mean())
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tuning_changes_a_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from tileloss.kernels import pairwise, pairwise_backward

    class Fixed:
        """A kernel in one of its configurations."""

        def __init__(self, kernel, config) -> None:
            self.kernel, self.config = kernel.fn, config

        def __getitem__(self, grid: tuple[int, ...]):
            start = self.kernel[grid]
            return lambda *arguments, **constants: start(*arguments, **(constants | self.config.all_kwargs()))

    x, weights = rows(1001, 384, dtype), torch.randn(1001, 1001, device="cuda")
    forward, backward = pairwise.pairwise_fwd_kernel, pairwise_backward.pairwise_bwd_kernel
    results = []
    for there, back in zip(pairwise.CONFIGS, pairwise_backward.CONFIGS, strict=True):
        monkeypatch.setattr(pairwise, "pairwise_fwd_kernel", Fixed(forward, there))
        monkeypatch.setattr(pairwise_backward, "pairwise_bwd_kernel", Fixed(backward, back))
        results.append(with_gradients(weights, x))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
