"""Row normalisation and its gradient, as torch.nn.functional.normalize and autograd have them."""

import pytest
import torch
import torch.nn.functional as F

from tileloss.kernels import unit_rows

ROUNDING = {torch.float32: 2e-7, torch.float16: 6e-4}


@pytest.fixture(autouse=True)
def _narrow_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_rows, "_WIDEST_BLOCK", 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 3, 32, 65])
def test_forward(width: int, dtype: torch.dtype, device: torch.device, poisoned_empty: None) -> None:
    x = torch.randn(7, 2 * width, device=device)[:, ::2]
    unit, norms = unit_rows.unit_rows(x, dtype)
    assert unit.dtype == dtype
    assert unit.is_contiguous()
    torch.testing.assert_close(unit.float(), F.normalize(x, dim=1), rtol=ROUNDING[dtype], atol=1e-7)
    torch.testing.assert_close(norms, torch.linalg.vector_norm(x, dim=1, keepdim=True), rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [3, 65])
def test_backward(width: int, dtype: torch.dtype, device: torch.device, poisoned_empty: None) -> None:
    x, d_unit = torch.randn(2, 7, width, device=device)
    x[1] = 0.0  # as in normalize, a row below the clamp counts its norm as a constant
    x[2] *= 1e-14
    unit, norms = unit_rows.unit_rows(x, dtype)
    factor = torch.tensor(3.0, device=device)
    found = unit_rows.unit_rows_backward(d_unit.clone(), unit, norms, factor)
    exact = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(F.normalize(exact, dim=1), exact, 3.0 * d_unit.double())
    assert found.dtype == torch.float32, "float16 is too narrow for a gradient that waits"
    if dtype == torch.float16:  # whose range ends below these
        found, expected = found[3:], expected[3:]
    error = (found.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 2 * ROUNDING[dtype]


def test_expanded_rows(device: torch.device) -> None:
    row = torch.randn(1, 65, device=device)
    unit, _ = unit_rows.unit_rows(row.expand(5, -1), torch.float32)
    assert torch.equal(unit, unit_rows.unit_rows(row.repeat(5, 1), torch.float32)[0])
