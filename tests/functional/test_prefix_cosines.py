"""Paired cosines at every prefix width from one read are those of each width by itself, on every backend."""

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tileloss.errors import DtypeError, InputError, ShapeError
from tileloss.functional import prefix_cosines

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("tileloss.tiled.prefix_cosines"), "_PART_BYTES", 5000)
    torch.compiler.reset()


def pairs(size: int, width: int = 65, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    a = torch.randn(size, width, dtype=torch.float64)
    return [a.to(dtype), (a + torch.randn(size, width, dtype=torch.float64)).to(dtype)]


def with_gradients(cosines_of: Any, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    cosines = cosines_of(*leaves)
    weights = torch.linspace(-1, 1, cosines.numel(), dtype=cosines.dtype).view(cosines.shape)
    return [cosines.detach(), *torch.autograd.grad((cosines * weights).sum(), leaves)]


def one_by_one(dims: list[int]) -> Any:
    return lambda a, b: torch.stack([F.cosine_similarity(a[:, :d], b[:, :d], eps=1e-12) for d in dims], dim=1)


@pytest.mark.parametrize("size", [1, 2, 63, 100, 257])
@pytest.mark.parametrize(
    ("width", "dims"), [(1, [1]), (3, [1, 3]), (65, [65, 7, 40]), (65, [16, 16, 3]), (65, list(range(1, 66)))]
)
def test_cosine_of_every_prefix(size: int, width: int, dims: list[int], backend: str) -> None:
    inputs = pairs(size, width)
    found = with_gradients(lambda a, b: prefix_cosines(a, b, dims), inputs)
    for x, expected in zip(found, with_gradients(one_by_one(dims), inputs), strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-12)


def test_zeros_at_the_beginning(backend: str) -> None:
    a, b = pairs(5)
    a[1, :7], b[2, :16], a[3, :7], a[4] = 0.0, 0.0, 1e-14, 0.0
    exact = with_gradients(lambda a, b: prefix_cosines(a, b, [7, 16, 65], backend="reference"), [a, b])
    for x, expected in zip(with_gradients(lambda a, b: prefix_cosines(a, b, [7, 16, 65]), [a, b]), exact, strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-12)
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_the_eager_formula(dtype: torch.dtype) -> None:
    inputs = pairs(300, dtype=dtype)
    truth = with_gradients(lambda a, b: prefix_cosines(a, b, [7, 65]), [x.double() for x in inputs])
    found, eager = (
        with_gradients(lambda a, b, name=name: prefix_cosines(a, b, [7, 65], backend=name), inputs)
        for name in ("tiled", "reference")
    )
    assert found[0].dtype == torch.float32
    assert found[1].dtype == dtype
    for x, y, exact in zip(found, eager, truth, strict=True):
        error, allowed = ((z.double() - exact).norm() / exact.norm() for z in (x, y))
        assert error <= 3 * allowed + 1e-5


def test_any_strides_and_only_what_is_wanted(backend: str) -> None:
    a, b = pairs(20)
    _, d_a, d_b = with_gradients(lambda a, b: prefix_cosines(a, b, [40]), [a, b])
    assert not d_a[:, 40:].any()
    weights = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
    for place, expected in enumerate((d_a, d_b)):
        leaves = [x.T.contiguous().T.requires_grad_(place == i) for i, x in enumerate((a.clone(), b.clone()))]
        (prefix_cosines(*leaves, [40]) * weights).sum().backward()
        torch.testing.assert_close(leaves[place].grad, expected)
        assert leaves[1 - place].grad is None
    one = a[:1].clone().requires_grad_()
    prefix_cosines(one.expand(20, -1), b, [40]).sum().backward()
    assert one.grad is not None
    assert one.grad.shape == (1, 65)


def test_second_derivatives_are_the_definitions(backend: str) -> None:
    leaves = [x.requires_grad_() for x in pairs(5, 8)]
    assert torch.autograd.gradgradcheck(lambda a, b: prefix_cosines(a, b, [8, 3]), leaves)


def test_one_graph_with_the_same_numbers(backend: str) -> None:
    inputs = pairs(20)
    compiled = torch.compile(lambda a, b: prefix_cosines(a.tanh(), b, [65, 7]), fullgraph=True, backend="aot_eager")
    found, expected = (
        with_gradients(f, inputs) for f in (compiled, lambda a, b: prefix_cosines(a.tanh(), b, [65, 7]))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, False)])
def test_opcheck(needs: tuple[bool, bool]) -> None:
    a, b = (x.requires_grad_(need) for x, need in zip(pairs(9, 8), needs, strict=True))
    torch.library.opcheck(torch.ops.tileloss.prefix_cosines.default, (a, b, [3, 8], "tiled"), test_utils=CHECKS)
    sums = torch.randn(2, 9, dtype=torch.float64), torch.rand(2, 2, 9, dtype=torch.float64)
    arguments = sums[0], a.detach(), b.detach(), sums[0], sums[1], [3, 8], list(needs), "tiled"
    torch.library.opcheck(torch.ops.tileloss.prefix_cosines_backward.default, arguments, test_utils=CHECKS)


def test_no_copies_of_the_inputs() -> None:
    a, b = (x.requires_grad_() for x in pairs(2000, dtype=torch.float32))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        prefix_cosines(a, b, [65, 32, 16], backend="tiled").sum().backward()
    peak = held = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak < 1.4 * (a.nbytes + b.nbytes), "the gradients, and little beside them"


def test_bad_input() -> None:
    a, b = pairs(4)
    with pytest.raises(ShapeError, match="row i of one is paired"):
        prefix_cosines(a, b[:3], [7])
    with pytest.raises(DtypeError, match="convert one"):
        prefix_cosines(a, b.float(), [7])
    with pytest.raises(ShapeError, match="cannot exceed the width of the embeddings, 65"):
        prefix_cosines(a, b, [66])
    with pytest.raises(InputError, match="at least one"):
        prefix_cosines(a, b, [])
