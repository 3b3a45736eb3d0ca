"""Paired cosines of prefixes in Triton against the definition in float64."""

import pytest
import torch
from torch import Tensor

from tileloss.backend import interpreting
from tileloss.functional import prefix_cosines
from tileloss.kernels import unit_rows

DTYPES = [torch.float32, torch.float16, *([] if interpreting() else [torch.bfloat16])]


@pytest.fixture(autouse=True)
def _narrow_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_rows, "_WIDEST_BLOCK", 32)


def run(inputs: list[Tensor], dims: list[int], backend: str, needs: tuple[bool, bool] = (True, True)) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    cosines = prefix_cosines(*leaves, dims, backend=backend)
    weights = torch.linspace(-1, 1, cosines.numel(), device=cosines.device).view(cosines.shape)
    return [cosines.detach(), *torch.autograd.grad((cosines * weights).sum(), [x for x in leaves if x.requires_grad])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "width", "dims"), [(1, 1, [1]), (2, 3, [3, 1]), (33, 65, [40, 7, 16]), (10, 65, [65, 64, 3])]
)
def test_as_exact_as_the_definition(
    size: int, width: int, dims: list[int], dtype: torch.dtype, device: torch.device, poisoned_empty: None
) -> None:
    torch.manual_seed(0)
    a = torch.randn(size, width, device=device)
    inputs = [a.to(dtype), (a + torch.randn(size, width, device=device)).to(dtype)]
    truth = run([x.double() for x in inputs], dims, "reference")
    found, eager = (run(inputs, dims, name) for name in ("triton", "reference"))
    if size < 33:
        assert all(map(torch.equal, found, run(inputs, dims, "triton"))), "two runs must give the same bits"
    for x, y, exact in zip(found, eager, truth, strict=True):
        assert x.dtype == y.dtype
        # a cosine of one number each does not change, so that its gradient is what terms of that size leave
        size_of_terms = inputs[0].double().norm().reciprocal() if width == 1 else 1e-3
        error, allowed = ((z.double() - exact).norm() / exact.norm().clamp_min(size_of_terms) for z in (x, y))
        assert error <= 3 * allowed + 1e-5


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_strides_and_only_what_is_wanted(needs: tuple[bool, bool], device: torch.device, poisoned_empty: None) -> None:
    torch.manual_seed(0)
    a = torch.randn(40, 20, device=device).T
    b = torch.randn(1, 40, device=device).expand(20, -1)
    for found, exact in zip(
        run([a, b], [7, 30], "triton", needs), run([a, b], [7, 30], "reference", needs), strict=True
    ):
        torch.testing.assert_close(found, exact)


def test_zeros_at_the_beginning(device: torch.device, poisoned_empty: None) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 4, 20, device=device)
    a[1, :7], b[2, :7], a[3, :7] = 0.0, 0.0, 1e-14
    for found, exact in zip(run([a, b], [7, 20], "triton"), run([a, b], [7, 20], "reference"), strict=True):
        torch.testing.assert_close(found, exact)
