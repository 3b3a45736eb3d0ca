"""What only a GPU can show of the ranking loss: its scans, the same bits twice, memory, silence."""

import pytest
import torch
from torch import Tensor

from tileloss.functional import ranking_loss

pytestmark = pytest.mark.gpu


def batch(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    scores = 20 * (2 * torch.rand(size, device="cuda", generator=generator) - 1)
    return scores.to(dtype), torch.randint(100, (size,), device="cuda", generator=generator)


def value_and_gradient(scores: Tensor, labels: Tensor, backend: str = "auto") -> list[Tensor]:
    scores = scores.detach().requires_grad_()
    loss = ranking_loss(scores, labels, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, scores)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 63, 1025, 5003])
def test_as_exact_as_the_definition(size: int, dtype: torch.dtype) -> None:
    scores, labels = batch(size, dtype)
    truth = value_and_gradient(scores.double(), labels, "reference")
    eager, found = (value_and_gradient(scores, labels, name) for name in ("reference", "triton"))
    for part, slack in enumerate((1e-5, 1e-4)):
        allowed, error = ((x[part].double() - truth[part]).norm() for x in (eager, found))
        assert error <= 3 * allowed + slack * truth[part].norm(), part


def test_two_runs_give_the_same_bits() -> None:
    inputs = batch(1_000_003)
    for _ in range(5):
        first, second = (value_and_gradient(*inputs) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_host_never_waits() -> None:
    inputs = batch(20_000)
    value_and_gradient(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradient(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_linear() -> None:
    scores, labels = batch(1_000_003)
    value_and_gradient(scores, labels)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value_and_gradient(scores, labels)
    assert torch.cuda.max_memory_allocated() - before <= 60 * scores.nbytes
