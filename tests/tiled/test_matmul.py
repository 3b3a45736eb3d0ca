"""The GEMMs give the products that they say, whichever library multiplies, and oneDNN is asked only where known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tileloss.tiled import onednn
from tileloss.tiled.matmul import accumulate, multiply

# more columns than one step of oneDNN's, sizes that no vector register divides, and sizes below its smallest
SHAPES = [(70, 1100, 65), (64, 2048, 128), (129, 64, 1030), (3, 5, 2)]
HAS_OPERATOR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(not HAS_OPERATOR, reason="no oneDNN"))])
def by_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to multiply, whatever this machine's own choice is."""
    monkeypatch.setattr(onednn, "is_faster_here", lambda: request.param)
    return bool(request.param)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def strided(x: Tensor) -> Tensor:
    """The same numbers as columns of a wider matrix."""
    wide = torch.randn(len(x), x.shape[1] + 5, dtype=x.dtype)
    wide[:, 2:-3] = x
    return wide[:, 2:-3]


@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
@pytest.mark.parametrize("arrange", [Tensor.contiguous, strided])
def test_products_are_those_of_float64(
    n: int, m: int, d: int, arrange: Callable[[Tensor], Tensor], by_onednn: bool
) -> None:
    torch.manual_seed(0)
    x, y, grad = torch.randn(n, d), torch.randn(m, d), arrange(torch.randn(n, m))
    started = torch.randn(max(n, m), d)
    wide = grad.double()
    assert error(multiply(x, y.t(), out=arrange(torch.empty(n, m))), x.double() @ y.double().t()) < 1e-6
    block = arrange(torch.randn(n, m))
    expected = block.double() + x.double() @ y.double().t()
    assert error(accumulate(block, x, y.t()), expected) < 1e-6
    expected = started[:n].double() + wide @ y.double()
    assert error(accumulate(started[:n].clone(), grad, y), expected) < 1e-6
    expected = started[:m].double() + wide.t() @ x.double()
    assert error(accumulate(started[:m].clone(), grad.t(), x), expected) < 1e-6
    assert error(accumulate(started[:m].clone(), grad.t(), strided(x)), expected) < 1e-6
    by_columns = started[:m].t().contiguous().t()
    assert error(accumulate(by_columns, grad.t(), x), expected) < 1e-6
    assert by_columns.stride() == (1, m)


@pytest.mark.skipif(not HAS_OPERATOR, reason="no oneDNN")
def test_two_runs_give_the_same_bits(by_onednn: bool) -> None:
    x, y, grad = torch.randn(100, 384), torch.randn(1500, 384), torch.randn(100, 1500)
    runs = [
        (multiply(x, y.t(), out=torch.empty(100, 1500)), accumulate(torch.zeros(1500, 384), grad.t(), x))
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_only_large_float32_matrices_on_the_cpu_go_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_faster_here", lambda: True)
    large = torch.empty(64, 64)
    assert onednn.serves(large, large)
    assert not onednn.serves(large, large.double())
    assert not onednn.serves(large, large.bfloat16())
    assert not onednn.serves(large, large.to("meta"))
    assert not onednn.serves(large, large[:, :63])
    monkeypatch.setattr(onednn, "is_faster_here", lambda: False)
    assert not onednn.serves(large, large)


@pytest.mark.parametrize(
    ("vendor", "family", "expected"),
    [("AuthenticAMD", 26, True), ("AuthenticAMD", 25, False), ("GenuineIntel", 26, False)],
)
def test_only_wide_units_of_amd_want_onednn(vendor: str, family: int, expected: bool) -> None:
    processor = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 17\n\n"
    assert onednn.has_wide_units_of_amd(processor * 2) == expected


def test_a_build_without_the_operator_goes_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    onednn.is_faster_here.cache_clear()
    monkeypatch.setattr(onednn, "_SCHEMA", "(Tensor X) -> Tensor")
    try:
        assert not onednn.is_faster_here()
    finally:
        onednn.is_faster_here.cache_clear()
