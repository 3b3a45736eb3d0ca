"""What only a GPU can show of dispersion: full-size blocks, the same bits twice, memory, silence."""

import os

os.environ.setdefault("TILELOSS_AUTOTUNE", "0")

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import tileloss
from tileloss.functional import dispersion

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    torch.cuda.empty_cache()
    with tileloss.use_backend("triton"):
        yield


def batch(size: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows that have a direction in common, as a leaf."""
    generator = torch.Generator("cuda").manual_seed(0)
    common = torch.randn(width, device="cuda", generator=generator)
    rows = torch.randn(size, width, device="cuda", generator=generator) + 0.3 * common
    return rows.to(dtype).requires_grad_()


def values_and_gradient(rows: Tensor) -> list[Tensor]:
    found = dispersion(rows)
    (gradient,) = torch.autograd.grad(0.3 * found.mean + found.second_moment, rows)
    return [found.mean.detach(), found.second_moment.detach(), gradient]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "width"), [(5003, 200), (700, 1000)])
def test_as_exact_as_the_definition(size: int, width: int, dtype: torch.dtype) -> None:
    rows = batch(size, width, dtype)
    with tileloss.use_backend("reference"):
        truth = values_and_gradient(rows.detach().double().requires_grad_())
        eager = values_and_gradient(rows)
    for part, slack in enumerate((1e-5, 1e-5, 1e-4)):
        exact = truth[part]
        error, allowed = ((x[part].double() - exact).norm() / exact.norm() for x in (values_and_gradient(rows), eager))
        assert error <= 3 * allowed + slack, part


@pytest.mark.parametrize("size", [5000, 300])
def test_two_runs_give_the_same_bits(size: int) -> None:
    rows = batch(size, 384, torch.float32)
    first, second = (values_and_gradient(rows) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("size", [3000, 300])
def test_the_host_never_waits(size: int) -> None:
    rows = batch(size, 384, torch.bfloat16)
    values_and_gradient(rows)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        values_and_gradient(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_large_batches_stay_within_800_megabytes() -> None:
    """Beside the inputs and their gradients, where the similarities alone would be 68 GB: a few blocks of rows."""
    rows = batch(131_072, 768, torch.float32)
    values_and_gradient(rows[:2048].detach().requires_grad_())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    values_and_gradient(rows)
    assert torch.cuda.max_memory_allocated() - before - rows.nbytes <= 800e6
