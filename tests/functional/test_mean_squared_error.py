"""The mean squared error with its gradient from one read: PyTorch's value and gradient, and no less exact."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tileloss
from tileloss.functional.mean_squared_error import mean_squared_error

tiled = importlib.import_module("tileloss.tiled.mean_squared_error")


@pytest.fixture(autouse=True)
def blocks_of_three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "_BLOCK_BYTES", 3 * 5 * 8)


def value_and_gradient(a: Tensor, b: Tensor, factor: float = 3.0) -> list[Tensor]:
    a = a.detach().requires_grad_()
    with tileloss.use_backend("tiled"):
        loss = mean_squared_error(a, b)
    return [loss.detach(), *torch.autograd.grad(factor * loss, a)]


def definition(a: Tensor, b: Tensor, factor: float = 3.0) -> list[Tensor]:
    a = a.detach().requires_grad_()
    loss = F.mse_loss(a, b.expand_as(a))
    return [loss.detach(), *torch.autograd.grad(factor * loss, a)]


@pytest.mark.parametrize("factor", [1.0, -0.5])
@pytest.mark.parametrize("teachers", ["one each", "one for all"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 5), (7, 5), (64, 9)])
def test_agrees_with_pytorch(rows: int, width: int, teachers: str, factor: float) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(rows, width).double(), torch.randn(rows if teachers == "one each" else 1, width).double()
    for x, y in zip(value_and_gradient(a, b, factor), definition(a, b, factor), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_columns_of_a_wider_matrix() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(8, 20).double()[::2, ::3], torch.randn(7, 4).double().T
    for x, y in zip(value_and_gradient(a, b), definition(a, b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_pytorch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(1000, 5).to(dtype), torch.randn(1000, 5).to(dtype)
    truth, eager, found = definition(a.double(), b.double()), definition(a, b), value_and_gradient(a, b)
    assert [x.dtype for x in found] == [torch.float32, dtype]
    for x, y, exact in zip(found, eager, truth, strict=True):
        error, slack = (((z.double() - exact).norm() / exact.norm()).item() for z in (x, y))
        assert error <= 3 * slack + 1e-6


def test_a_kept_graph_gives_the_gradient_again() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(7, 5).double().requires_grad_(), torch.randn(7, 5).double()
    with tileloss.use_backend("tiled"):
        loss = 2 * mean_squared_error(a, b)
    first = torch.autograd.grad(loss, a, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(loss, a)[0], first, rtol=1e-12, atol=1e-12)


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 5).double().requires_grad_(), torch.randn(4, 5).double()
    with tileloss.use_backend("tiled"):
        assert torch.autograd.gradcheck(lambda a: mean_squared_error(a, b), a)
        assert torch.autograd.gradgradcheck(lambda a: mean_squared_error(a, b), a)


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    a, b = torch.ones(7, 5, requires_grad=True), torch.zeros(7, 5)
    with torch.no_grad(), tileloss.use_backend("tiled"):
        assert mean_squared_error(a, b) == 1.0
    assert tiled.mean_squared_error(a.detach(), b, False)[1] is None


def test_the_gradient_is_handed_over_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    module, made = importlib.import_module("tileloss.functional.mean_squared_error"), []

    def spy(*inputs: object) -> object:
        result = tiled.mean_squared_error(*inputs)
        made.append(result[1].data_ptr())
        return result

    monkeypatch.setattr(module, "in_blocks", spy)
    a = torch.randn(7, 5, requires_grad=True)
    with tileloss.use_backend("tiled"):
        mean_squared_error(a, torch.zeros(7, 5)).backward()
    assert a.grad is not None
    assert made == [a.grad.data_ptr()]


def test_the_compiler_passes_through() -> None:
    a, b = torch.randn(7, 5, requires_grad=True), torch.zeros(7, 5)
    with tileloss.use_backend("tiled"):
        compiled = torch.compile(mean_squared_error, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(a, b), mean_squared_error(a, b))
