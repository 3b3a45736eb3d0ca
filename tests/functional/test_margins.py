"""Margins of dot products: the difference of two products, its gradients, and no less exact."""

import importlib

import pytest
import torch
from torch import Tensor

import tileloss
from tileloss.errors import ShapeError
from tileloss.functional.margins import dot_margins


@pytest.fixture(autouse=True)
def blocks_of_three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importlib.import_module("tileloss.tiled.pairs")._BLOCK_BYTES, "cpu", 3 * 5 * 8)


def batch(rows: int, width: int, dtype: torch.dtype = torch.double) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(rows, width).to(dtype) for _ in range(4)][:3]


def difference(queries: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    return (queries * positives).sum(dim=1) - (queries * negatives).sum(dim=1)


def value_and_gradients(function: object, matrices: list[Tensor], backend: str = "tiled") -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in matrices]
    with tileloss.use_backend(backend):
        margins = function(*leaves)  # type: ignore[operator]
    weights = torch.linspace(-1, 2, len(margins), dtype=margins.dtype)
    return [margins.detach(), *torch.autograd.grad(margins @ weights, leaves)]


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 5), (7, 5), (64, 9)])
def test_is_the_difference_of_two_products(rows: int, width: int, backend: str) -> None:
    inputs = batch(rows, width)
    found, truth = value_and_gradients(dot_margins, inputs, backend), value_and_gradients(difference, inputs)
    for x, y in zip(found, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_two_products(dtype: torch.dtype) -> None:
    inputs = batch(500, 33, dtype)
    truth = value_and_gradients(difference, [x.double() for x in inputs])
    eager = value_and_gradients(lambda *xs: difference(*(x.float() for x in xs)), inputs)
    found = value_and_gradients(dot_margins, inputs)
    assert [x.dtype for x in found] == [torch.float32, dtype, dtype, dtype]
    for x, y, exact in zip(found, eager, truth, strict=True):
        error, slack = (((z.double() - exact).norm() / exact.norm()).item() for z in (x, y))
        assert error <= 3 * slack + 1e-6


def test_close_products_lose_no_digits() -> None:
    queries, positives, negatives = batch(7, 5, torch.float32)
    queries, negatives = 1e3 * queries, positives + 1e-4 * negatives
    exact = difference(queries.double(), positives.double(), negatives.double())
    with tileloss.use_backend("tiled"):
        torch.testing.assert_close(dot_margins(queries, positives, negatives).double(), exact, rtol=1e-5, atol=1e-6)


def test_derivatives() -> None:
    leaves = [x.requires_grad_() for x in batch(4, 5)]
    with tileloss.use_backend("tiled"):
        assert torch.autograd.gradcheck(dot_margins, leaves)
        assert torch.autograd.gradgradcheck(dot_margins, leaves)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_only_the_gradients_that_are_wanted(place: int) -> None:
    inputs = batch(7, 5)
    truth = value_and_gradients(difference, inputs)[1 + place]
    leaf = inputs[place].requires_grad_()
    with tileloss.use_backend("tiled"):
        margins = dot_margins(*inputs)
    (margins @ torch.linspace(-1, 2, 7, dtype=margins.dtype)).backward()
    torch.testing.assert_close(leaf.grad, truth)
    assert [x.grad is None for x in inputs] == [i != place for i in range(3)]


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_no_rows(backend: str) -> None:
    empty = torch.empty(0, 5)
    with tileloss.use_backend(backend):
        assert dot_margins(empty, empty, empty).shape == (0,)


def test_matrices_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match="row i is compared with row i"):
        dot_margins(torch.ones(3, 5), torch.ones(3, 5), torch.ones(2, 5))


def test_the_compiler_passes_through() -> None:
    inputs = [x.requires_grad_() for x in batch(7, 5)]
    with tileloss.use_backend("tiled"):
        compiled = torch.compile(dot_margins, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), dot_margins(*inputs))
