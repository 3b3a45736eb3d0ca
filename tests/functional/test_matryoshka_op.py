"""All prefix widths as a registered operator: exact, differentiable twice, whole under torch.compile, and small."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import tileloss
from tileloss import Guide, reference
from tileloss.functional import matryoshka_contrastive_loss, matryoshka_contrastive_loss_with_stats
from tileloss.spec import DIRECTIONS

CLIP = ("query_to_doc", "doc_to_query")
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
WEIGHTS = {65: 1.0, 7: 0.5, 40: 2.0}
BLOCK = 1 << 20


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def batch(size: int, count: int, width: int = 65, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    queries, docs = torch.randn(size, width), torch.randn(count, width)
    docs[:size] += queries
    return [queries.to(dtype), docs.to(dtype), torch.tensor(10.0)]


def loss_of(queries: Tensor, docs: Tensor, scale: Tensor, **options: Any) -> Tensor:
    return matryoshka_contrastive_loss(queries, docs, dims=WEIGHTS, scale=scale, **options)


def with_gradients(loss_of: Callable[..., Tensor], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = loss_of(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"directions": DIRECTIONS}, {"hardness": ("in_batch_negatives", 5.0)}])
def test_as_exact_as_the_eager_formula(dtype: torch.dtype, options: dict) -> None:
    inputs = batch(300, 600, dtype=dtype)
    truth = with_gradients(loss_of, [x.double() for x in inputs], backend="reference", **options)
    eager = errors(with_gradients(loss_of, inputs, backend="reference", **options), truth)
    found = with_gradients(loss_of, inputs, backend="tiled", **options)
    assert truth[0] > 0.1, "a batch without hard rows shows nothing"
    assert found[0].dtype == torch.float32
    assert found[1].dtype == dtype
    for error, allowed, slack in zip(errors(found, truth), eager, (1e-5, 1e-4, 1e-4, 1e-4), strict=True):
        assert error <= 3 * allowed + slack


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="no oneDNN")
def test_products_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the machines where it is the faster library."""
    monkeypatch.setattr(importlib.import_module("tileloss.tiled.onednn"), "is_faster_here", lambda: True)
    queries, docs, scale = batch(300, 300, width=200)
    results = []
    for inputs in ([x.double() for x in (queries, docs, scale)], [queries, docs, scale]):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = matryoshka_contrastive_loss(*leaves[:2], dims=[64, 128, 200], scale=leaves[2], backend="tiled")
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert max(errors(results[1], results[0])) < 1e-5


def test_large_and_small_rows() -> None:
    """Products are of rows as they are given: their lengths must not show in the digits."""
    queries, docs, scale = batch(64, 64)
    truth = with_gradients(loss_of, [x.double() for x in (queries, docs, scale)], backend="tiled")
    loss, d_queries, d_docs, _ = with_gradients(loss_of, [queries * 1e6, docs * 1e-6, scale], backend="tiled")
    assert max(errors([loss, d_queries * 1e6, d_docs * 1e-6], truth[:3])) < 1e-5


def test_two_runs_give_the_same_bits() -> None:
    inputs = batch(300, 300)
    for options in ({}, {"directions": CLIP}):
        first, second = (with_gradients(loss_of, inputs, backend="tiled", **options) for _ in range(2))
        assert all(map(torch.equal, first, second))


def test_backward_of_a_retained_graph_repeats() -> None:
    queries, docs, scale = (x.requires_grad_() for x in batch(20, 20))
    loss = loss_of(queries, docs, scale, backend="tiled")
    first = torch.autograd.grad(3 * loss, (queries, docs, scale), retain_graph=True)
    second = torch.autograd.grad(loss, (queries, docs, scale))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 3 * b)


@pytest.mark.parametrize("directions", [("query_to_doc",), CLIP])
def test_second_derivatives_are_the_definitions(directions: tuple[str, ...]) -> None:
    results = []
    for backend in ("reference", "tiled"):
        leaves = [x.double().requires_grad_() for x in batch(12, 24)]
        loss = loss_of(*leaves, directions=directions, backend=backend)
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"directions": CLIP, "partition": "per_direction"}])
def test_one_graph_with_the_same_numbers(options: dict, backend: str) -> None:
    inputs = batch(20, 40)
    compiled = torch.compile(lambda *x: loss_of(*x, **options), fullgraph=True, backend="aot_eager")
    for a, b in zip(with_gradients(compiled, inputs), with_gradients(loss_of, inputs, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_compiled_backward_does_not_materialise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "matryoshka_contrastive_loss", lambda *_, **__: None)
    compiled = torch.compile(lambda *x: loss_of(*x, backend="tiled"), fullgraph=True, backend="aot_eager")
    with_gradients(compiled, batch(20, 20))


def test_statistics_come_through() -> None:
    queries, docs, _ = batch(20, 20)
    compiled = torch.compile(matryoshka_contrastive_loss_with_stats, fullgraph=True, backend="aot_eager")
    with tileloss.use_backend("tiled"):
        torch.testing.assert_close(
            compiled(queries, docs, dims=[65, 7])[1][7],
            matryoshka_contrastive_loss_with_stats(queries, docs, dims=[7])[1][7],
        )


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, False, False]])
@pytest.mark.parametrize("directions", ["query_to_doc", "query_to_doc+doc_to_query"])
def test_opcheck(needs: list[bool], directions: str) -> None:
    inputs = [x.requires_grad_(need) for x, need in zip(batch(9, 18, 8), needs, strict=True)]
    torch.library.opcheck(
        torch.ops.tileloss.matryoshka.default,
        (
            *inputs, torch.arange(18) // 2, None, None, None, 0.0, "", 0.0, directions, "joint", "", 0.0,
            [3, 8], [1.0, 0.5], needs, "tiled",
        ),
        test_utils=CHECKS,
    )  # fmt: skip


def peak_bytes(size: int, backend: str, **options: Any) -> int:
    """The most that was allocated at one time during a forward and a backward, beside the inputs."""
    queries, docs = (torch.randn(size, 8, requires_grad=True) for _ in range(2))
    if "exclude" in options:
        options = options | {"exclude": Guide(queries.detach(), docs.detach())}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        matryoshka_contrastive_loss(queries, docs, dims=[8, 4, 2], backend=backend, **options).backward()
    peak = held = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("options", [{}, {"directions": CLIP}, {"exclude": Guide}], ids=["rows", "clip", "guide"])
def test_peak_is_bounded_by_blocks(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = importlib.import_module("tileloss.tiled.blocks")
    monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", BLOCK)
    monkeypatch.setitem(blocks.MIN_ROWS, "cpu", 4)
    monkeypatch.setattr(importlib.import_module("tileloss.tiled.matryoshka"), "_PART_BYTES", BLOCK // 8)
    small, large = (peak_bytes(size, "tiled", **options) for size in (1024, 2048))
    assert large < 2 * BLOCK + 26 * 2048 * 8 * 4
    assert large < 2.1 * small
    assert peak_bytes(2048, "reference", **options) > 6 * 2048 * 2048 * 4, "or the measurement sees nothing"
