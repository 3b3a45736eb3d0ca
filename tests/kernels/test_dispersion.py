"""Dispersion with the unit rows of Triton: the same numbers, no less exact."""

import importlib

import pytest
import torch
from torch import Tensor

from tileloss.functional import dispersion


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch, small_blocks: None) -> None:
    monkeypatch.setattr(importlib.import_module("tileloss.tiled.dispersion"), "_PREPARED_BYTES", 1)


def values_and_gradient(rows: Tensor, similarity: str, backend: str) -> list[Tensor]:
    rows = rows.detach().requires_grad_()
    found = dispersion(rows, similarity=similarity, backend=backend)
    (gradient,) = torch.autograd.grad(0.3 * found.mean - 2 * found.second_moment, rows)
    return [found.mean.detach(), found.second_moment.detach(), gradient]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("similarity", "dtype"),
    [("cosine", torch.float32), ("cosine", torch.float16), ("torch_cosine", torch.float32), ("dot", torch.float16)],
)
@pytest.mark.parametrize(("size", "width"), [(1, 3), (2, 65), (63, 65), (100, 33)])
def test_as_exact_as_eager(size: int, width: int, similarity: str, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    rows = (torch.randn(size, width) + torch.randn(width)).to(device, dtype)
    rows[0] = 0.0
    truth = values_and_gradient(rows.double(), similarity, "reference")
    eager, found = (values_and_gradient(rows, similarity, name) for name in ("reference", "triton"))
    assert [x.dtype for x in found] == [torch.float32, torch.float32, dtype]
    for part, slack in enumerate((1e-5, 1e-5, 1e-4)):
        # what a zero row has for a gradient would drown the others'
        exact, *both = (x[part].double() if part < 2 else x[part][1:].double() for x in (truth, eager, found))
        allowed, error = ((x - exact).norm() for x in both)
        assert error <= 3 * allowed + slack * exact.norm() + 1e-9, part


def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    rows = torch.randn(100, 33, device=device)
    first, second = (values_and_gradient(rows, "cosine", "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
