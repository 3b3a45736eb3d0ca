"""The matrices as registered operators: whole under torch.compile, and correct by PyTorch's own checks."""

import pytest
import torch
from torch import Tensor

import tileloss
from tileloss import reference
from tileloss.functional import pairwise_distance, pairwise_similarity
from tileloss.metrics import METRICS

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_one_graph_with_the_same_numbers(metric: str, within: bool, backend: str) -> None:
    torch.manual_seed(0)

    def step(weight: Tensor, x: Tensor) -> Tensor:
        rows = (x @ weight).tanh()
        distances = pairwise_distance(rows, None if within else rows[:9], metric=metric)
        return (distances + pairwise_similarity(rows[:, :3], rows[:9, :3], similarity=metric).sum()).square().sum()

    weight, x = torch.randn(8, 5, requires_grad=True), torch.randn(20, 8)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        (compiled(weight, x), *torch.autograd.grad(compiled(weight, x), weight)),
        (step(weight, x), *torch.autograd.grad(step(weight, x), weight)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_automatic_choice_and_every_size() -> None:
    compiled = torch.compile(pairwise_distance, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (3, 300, 41):
        a, b = torch.randn(size, 5), torch.randn(2 * size, 5)
        torch.testing.assert_close(compiled(a, b), pairwise_distance(a, b))


def test_the_compiled_backward_takes_no_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "pairwise_matrix", None)
    compiled = torch.compile(lambda a: pairwise_distance(a, backend="tiled"), fullgraph=True, backend="aot_eager")
    a = torch.randn(20, 5, requires_grad=True)
    compiled(a).sum().backward()
    assert a.grad is not None


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, metric: str, needs: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(rows, 4).to(dtype).requires_grad_(need) for rows, need in zip((9, 7), needs, strict=True))
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    for other in (b, None):
        torch.library.opcheck(
            torch.ops.tileloss.pairwise.default, (a, other, metric, False, "tiled"), test_utils=CHECKS, **tolerance
        )
    a, b = a.detach(), b.detach()
    matrix = torch.ops.tileloss.pairwise(a, b, metric, True, "tiled")
    arguments = (matrix, a, b, matrix, metric, True, list(needs), "tiled")
    torch.library.opcheck(torch.ops.tileloss.pairwise_backward.default, arguments, test_utils=CHECKS)


def test_a_change_of_backend_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    definition = reference.pairwise_matrix

    def spy(*arguments: object) -> Tensor:
        calls.append("reference")
        return definition(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "pairwise_matrix", spy)
    compiled = torch.compile(pairwise_distance, backend="aot_eager")
    a = torch.randn(20, 5)
    for name, expected in (("tiled", False), ("reference", True), ("tiled", False)):
        calls.clear()
        with tileloss.use_backend(name):
            compiled(a)
        assert not (calls and not expected)
