"""Dispersion as registered operators: whole under torch.compile, correct by PyTorch's checks, small."""

import pytest
import torch
from torch import Tensor

from tileloss.bench.measure import cpu_peak
from tileloss.functional import dispersion, dispersion_op

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def crowding(rows: Tensor) -> Tensor:
    found = dispersion(rows.tanh())
    return found.mean.square() + (found.second_moment - 1 / rows.shape[1]).relu()


def value_and_gradient(loss_of, rows: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    rows = rows.clone().requires_grad_()
    loss = loss_of(rows)
    return [loss.detach(), *torch.autograd.grad(loss, rows)]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_one_graph_with_the_same_numbers(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispersion_op, "definition", None)  # it serves second derivatives alone
    rows = torch.randn(300, 5)
    compiled = torch.compile(crowding, fullgraph=True, backend=compiler)
    for a, b in zip(value_and_gradient(compiled, rows), value_and_gradient(crowding, rows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_one_graph_serves_every_batch_size(backend: str) -> None:
    """Fewer rows than columns, and more."""
    compiled = torch.compile(crowding, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (3, 20, 41):
        rows = torch.randn(size, 10)
        torch.testing.assert_close(compiled(rows), crowding(rows))


@pytest.mark.parametrize(
    ("dtype", "similarity"), [(torch.float64, "cosine"), (torch.float32, "dot"), (torch.bfloat16, "cosine")]
)
@pytest.mark.parametrize("size", [3, 9])
@pytest.mark.parametrize("need", [True, False])
def test_opcheck(size: int, dtype: torch.dtype, similarity: str, need: bool) -> None:
    torch.manual_seed(0)
    rows = torch.randn(size, 4).to(dtype).requires_grad_(need)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(
        torch.ops.tileloss.dispersion.default, (rows, similarity, "tiled"), test_utils=CHECKS, **tolerance
    )
    rows = rows.detach()
    mean, second_moment, gram, total = torch.ops.tileloss.dispersion(rows, similarity, "tiled")
    torch.library.opcheck(
        torch.ops.tileloss.dispersion_backward.default,
        (mean, second_moment, rows, gram, total, similarity, "tiled"),
        test_utils=CHECKS,
    )


def test_memory_is_linear() -> None:
    """The gradient and a megabyte of rows, more or less."""

    def peak(size: int, backend: str) -> int:
        rows = torch.randn(size, 64, requires_grad=True)
        return cpu_peak(lambda: sum(dispersion(rows, backend=backend)).backward())

    assert peak(20_000, "tiled") < 20_000 * 64 * 4 + 6e6
    assert peak(2000, "reference") > 3 * 2000 * 2000 * 4, "or the measurement sees nothing"
