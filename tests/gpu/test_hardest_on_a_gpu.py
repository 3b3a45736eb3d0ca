"""What only a GPU can show of the hardest negatives: full-size tiles, the same bits twice, memory, silence, offsets.

Exactness over a table of shapes is in tests/kernels, which runs there too.
"""

import os

os.environ.setdefault("TILELOSS_AUTOTUNE", "0")

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import tileloss
from tileloss.functional import hardest_negatives
from tileloss.kernels.chosen_pairs import pull_pairs

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    torch.cuda.empty_cache()
    with tileloss.use_backend("triton"):
        yield


def batch(size: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each query with a document of its own and one other that is clearly the nearest, as leaves."""
    generator = torch.Generator("cuda").manual_seed(0)
    queries = torch.randn(size, width, device="cuda", generator=generator)
    docs = queries + 0.8 * queries.roll(1, 0) + 0.2 * torch.randn(size, width, device="cuda", generator=generator)
    return queries.to(dtype).requires_grad_(), docs.to(dtype).requires_grad_()


def values_and_gradients(queries: Tensor, docs: Tensor) -> list[Tensor]:
    found = hardest_negatives(queries, docs)
    gradients = torch.autograd.grad(found.similarity.sum() - found.positive_similarity.sum(), (queries, docs))
    return [found.similarity.detach(), found.positive_similarity.detach(), *gradients, found.index]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_that_fit_no_tile(dtype: torch.dtype) -> None:
    queries, docs = batch(3001, 200, dtype)
    with tileloss.use_backend("tiled"):
        expected = values_and_gradients(*(x.detach().double().requires_grad_() for x in (queries, docs)))
    found = values_and_gradients(queries, docs)
    assert torch.equal(found[-1], expected[-1])
    rounding = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for ours, truth in zip(found[:-1], expected[:-1], strict=True):
        assert (ours.double() - truth).norm() < rounding * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    queries, docs = batch(5000, 384, dtype)
    first, second = (values_and_gradients(queries, docs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_host_never_waits() -> None:
    queries, docs = batch(3000, 384, torch.bfloat16)
    values_and_gradients(queries, docs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        values_and_gradients(queries, docs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_large_batches_stay_within_500_megabytes() -> None:
    """Beside the inputs and their gradients, forward and backward, where the similarities alone would be 4 GB."""
    queries, docs = batch(32_768, 768, torch.bfloat16)
    values_and_gradients(*(x[:2048].detach().requires_grad_() for x in (queries, docs)))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    values_and_gradients(queries, docs)
    assert torch.cuda.max_memory_allocated() - before - queries.nbytes - docs.nbytes <= 500e6


def test_one_row_that_all_have_chosen() -> None:
    """The worst case for the collecting kernel, with a number of rows past any tile."""
    left, right = torch.randn(100_003, 200, device="cuda"), torch.randn(7, 200, device="cuda")
    weights = torch.randn(100_003, 2, device="cuda")
    partners = torch.full((100_003, 2), 5, device="cuda")
    d_right = torch.zeros_like(right)
    pull_pairs(weights, partners, left, right, None, d_right)
    expected = weights.double().sum(dim=1) @ left.double()
    assert (d_right[5].double() - expected).norm() < 1e-5 * expected.norm()
    assert not d_right[[0, 1, 2, 3, 4, 6]].any()


def test_offsets_past_2_to_the_31() -> None:
    rows, width = 2_200_000, 1024
    left = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    left[-1], left[0] = 1.0, -1.0
    right = torch.ones(3, width, dtype=torch.bfloat16, device="cuda")
    partners = torch.zeros(rows, 1, dtype=torch.int64, device="cuda")
    partners[-1] = 2
    weights = torch.ones(rows, 1, device="cuda")
    d_right = torch.zeros(3, width, device="cuda")
    pull_pairs(weights, partners, left, right, None, d_right)
    assert torch.equal(d_right[:, 0].cpu(), torch.tensor([-1.0, 0.0, 1.0]))
