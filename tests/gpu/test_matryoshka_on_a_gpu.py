"""What only a GPU can show of all prefix widths at once: full-size tiles, the same bits twice, memory, both roads.

Exactness over a table of shapes is in tests/kernels, which runs there too.
"""

import os

os.environ.setdefault("TILELOSS_AUTOTUNE", "0")

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import tileloss
from tileloss.functional import matryoshka_contrastive_loss, prefix_cosines

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
CLIP = ("query_to_doc", "doc_to_query")
DIMS = {200: 1.0, 64: 0.5, 130: 2.0}


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    torch.cuda.empty_cache()
    with tileloss.use_backend("triton"):
        yield


def batch(size: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries and docs near them, as leaves, and short: gradients of cosines must not be too small for float16."""
    generator = torch.Generator("cuda").manual_seed(0)
    queries, noise = torch.randn(2, size, width, device="cuda", generator=generator) / 256
    return tuple(x.to(dtype, copy=True).requires_grad_() for x in (queries, queries + noise))


def with_gradients(queries: Tensor, docs: Tensor, directions: tuple[str, ...]) -> list[Tensor]:
    loss = matryoshka_contrastive_loss(queries, docs, dims=DIMS, directions=directions)
    return [loss.detach(), *torch.autograd.grad(loss, (queries, docs))]


@pytest.mark.parametrize("directions", [("query_to_doc",), CLIP])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_that_fit_no_tile(dtype: torch.dtype, directions: tuple[str, ...]) -> None:
    queries, docs = batch(3001, 200, dtype)
    with tileloss.use_backend("tiled"):
        expected = with_gradients(*(x.detach().double().requires_grad_() for x in (queries, docs)), directions)
    found = with_gradients(queries, docs, directions)
    for ours, truth in zip(found, expected, strict=True):
        assert (ours.double() - truth).norm() < ROUNDING[dtype] * truth.norm()
    again = with_gradients(queries, docs, directions)
    assert all(map(torch.equal, found, again)), "two runs must give the same bits"


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_both_roads_of_float32(precision: str) -> None:
    """Exact products are shared between the widths; those of tensor cores are not."""
    queries, docs = batch(2000, 200, torch.float32)
    with tileloss.use_backend("tiled"):
        expected = with_gradients(*(x.detach().double().requires_grad_() for x in (queries, docs)), CLIP)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = with_gradients(queries, docs, CLIP)
    finally:
        torch.set_float32_matmul_precision(before)
    for ours, truth in zip(found, expected, strict=True):
        assert (ours.double() - truth).norm() < (1e-5 if precision == "highest" else 5e-3) * truth.norm()


def test_memory_is_bounded() -> None:
    queries, docs = batch(16384, 200, torch.float32)
    with_gradients(*(x[:2048].detach().requires_grad_() for x in (queries, docs)), ("query_to_doc",))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with_gradients(queries, docs, ("query_to_doc",))
    assert torch.cuda.max_memory_allocated() - before < 4 * len(queries) ** 2, "what one width's cosines would take"


@pytest.mark.parametrize("dtype", DTYPES)
def test_paired_cosines(dtype: torch.dtype) -> None:
    a, b = batch(3001, 1000, dtype)
    exact = [x.detach().double().requires_grad_() for x in (a, b)]
    results = []
    for inputs, name in (((a, b), "triton"), (exact, "tiled")):
        cosines = prefix_cosines(*inputs, [1000, 64, 300], backend=name)
        results.append([cosines.detach(), *torch.autograd.grad(cosines.square().sum(), inputs)])
    for ours, truth in zip(*results, strict=True):
        assert (ours.double() - truth).norm() < ROUNDING[dtype] * truth.norm()
