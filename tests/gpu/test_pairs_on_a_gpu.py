"""What only a GPU can show of paired similarities: full-size rows, the same bits twice, memory, silence, offsets.

Exactness over a table of shapes is in tests/kernels, which runs there too.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import tileloss
from tileloss.functional import paired_distance, paired_similarity

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    torch.cuda.empty_cache()
    with tileloss.use_backend("triton"):
        yield


def matrices(size: int, width: int, dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(size, width, device="cuda", generator=generator).to(dtype).requires_grad_() for _ in range(count)
    ]


def values_and_gradients(a: Tensor, *others: Tensor) -> list[Tensor]:
    found = paired_similarity(a, others) - paired_distance(a, others, eps=1e-6)
    found = found + paired_similarity(a, others, similarity="angle")
    return [found.detach(), *torch.autograd.grad(found.sum(), (a, *others))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [200, 5001])
def test_as_exact_as_float64(width: int, dtype: torch.dtype) -> None:
    inputs = matrices(3001, width, dtype, 4)
    with tileloss.use_backend("reference"):
        expected = values_and_gradients(*(x.detach().double().requires_grad_() for x in inputs))
    rounding = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for ours, truth in zip(values_and_gradients(*inputs), expected, strict=True):
        assert (ours.double() - truth).norm() < rounding * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    inputs = matrices(5000, 384, dtype)
    first, second = (values_and_gradients(*inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_host_never_waits() -> None:
    inputs = matrices(3000, 384, torch.bfloat16)
    values_and_gradients(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        values_and_gradients(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_of_the_inputs_size_beside_the_gradients() -> None:
    a, b = matrices(32_768, 768, torch.bfloat16, 2)
    paired_similarity(a[:2048], b[:2048]).sum().backward()
    a.grad = b.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    paired_similarity(a, b).sum().backward()
    assert torch.cuda.max_memory_allocated() - before <= a.nbytes + b.nbytes + 4e6


def test_offsets_past_2_to_the_31() -> None:
    a = torch.zeros(2_200_000, 1024, dtype=torch.bfloat16, device="cuda")
    a[-1] = 1.0
    a.requires_grad_()
    found = paired_similarity(a, torch.ones(1, 1024, dtype=torch.bfloat16, device="cuda"), similarity="dot")
    assert found[-1] == 1024.0
    (gradient,) = torch.autograd.grad(found[-1], a)
    assert gradient[-1].sum() == 1024.0
    assert not gradient[:-1].any()
