"""The ranking loss as a registered operator: whole under torch.compile, correct by PyTorch's checks, small."""

import pytest
import torch
from torch import Tensor

from tileloss.bench.measure import cpu_peak
from tileloss.functional import ranking_loss, ranking_op

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def ranked(scores: Tensor, labels: Tensor) -> Tensor:
    return ranking_loss(20 * scores.tanh(), labels) / 2


def value_and_gradient(loss_of, scores: Tensor, labels: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    scores = scores.clone().requires_grad_()
    loss = loss_of(scores, labels)
    return [loss.detach(), *torch.autograd.grad(loss, scores)]


def test_one_graph_with_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking_op, "definition", None)  # it serves second derivatives alone
    inputs = torch.randn(100), torch.rand(100)
    compiled = torch.compile(ranked, fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_gradient(compiled, *inputs), value_and_gradient(ranked, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_one_graph_serves_every_batch_size(backend: str) -> None:
    compiled = torch.compile(ranked, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (3, 20, 41):
        inputs = torch.randn(size), torch.randint(4, (size,))
        torch.testing.assert_close(compiled(*inputs), ranked(*inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("need", [True, False])
def test_opcheck(dtype: torch.dtype, need: bool) -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(9).to(dtype).requires_grad_(need), torch.randint(4, (9,))
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(torch.ops.tileloss.ranking.default, (scores, labels), test_utils=CHECKS, **tolerance)


def test_memory_is_linear() -> None:
    def peak(size: int, backend: str) -> int:
        scores, labels = torch.randn(size, requires_grad=True), torch.rand(size)
        return cpu_peak(lambda: ranking_loss(scores, labels, backend=backend).backward())

    assert peak(4096, "tiled") < 25 * 4096 * 4
    assert peak(4096, "reference") > 2 * 4096 * 4096 * 4, "or the measurement sees nothing"
