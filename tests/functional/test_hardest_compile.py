"""Hardest negatives as registered operators: whole under torch.compile, correct by PyTorch's checks, small."""

import importlib

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tileloss.functional import hardest_negatives, hardest_op

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
WIDTH, BLOCK = 8, 1 << 20


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def margins(queries: Tensor, docs: Tensor) -> Tensor:
    found = hardest_negatives(queries.tanh(), docs)
    return (0.8 - found.positive_similarity).relu().mean() + (found.similarity + 0.3).relu().mean()


def value_and_gradients(loss_of, queries: Tensor, docs: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [x.clone().requires_grad_() for x in (queries, docs)]
    loss = loss_of(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_one_graph_with_the_same_numbers(compiler: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "tiled":  # the definition serves second derivatives alone
        monkeypatch.setattr(hardest_op, "definition", None)
    inputs = torch.randn(20, 5), torch.randn(30, 5)
    compiled = torch.compile(margins, fullgraph=True, backend=compiler)
    for a, b in zip(value_and_gradients(compiled, *inputs), value_and_gradients(margins, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_one_graph_serves_every_batch_size(backend: str) -> None:
    compiled = torch.compile(margins, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (3, 20, 41):
        inputs = torch.randn(size, 5), torch.randn(2 * size, 5)
        torch.testing.assert_close(compiled(*inputs), margins(*inputs))


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(
    ("dtype", "similarity"), [(torch.float64, "cosine"), (torch.float32, "dot"), (torch.bfloat16, "cosine")]
)
def test_opcheck(dtype: torch.dtype, similarity: str, wanted: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    queries, docs = (
        torch.randn(size, 4).to(dtype).requires_grad_(need) for size, need in zip((9, 18), wanted, strict=True)
    )
    # bfloat16 gradients agree to their own precision
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(
        torch.ops.tileloss.hardest.default, (queries, docs, similarity, "tiled"), test_utils=CHECKS, **tolerance
    )
    sums = torch.randn(2, 9, dtype=torch.promote_types(dtype, torch.float32))
    rows = queries.detach(), docs.detach()
    torch.library.opcheck(
        torch.ops.tileloss.hardest_backward.default,
        (*sums, *rows, torch.arange(9) - 1, similarity, list(wanted), "tiled"),
        test_utils=CHECKS,
    )


def peak_bytes(size: int, backend: str) -> int:
    """The most that was allocated at one time during a forward and a backward, beside the inputs."""
    queries, docs = (torch.randn(size, WIDTH, requires_grad=True) for _ in range(2))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        found = hardest_negatives(queries, docs, backend=backend)
        (found.similarity.sum() - found.positive_similarity.sum()).backward()
    peak = held = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_peak_is_bounded_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importlib.import_module("tileloss.tiled.blocks").BLOCK_BYTES, "cpu", BLOCK)
    small, large = (peak_bytes(size, "tiled") for size in (2048, 4096))
    assert large < BLOCK + 10 * 4096 * WIDTH * 4
    assert large < 2.1 * small
    assert peak_bytes(4096, "reference") > 2 * 4096 * 4096 * 4, "or the measurement sees nothing"
