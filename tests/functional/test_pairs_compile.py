"""Paired similarities as registered operators: whole under torch.compile, correct by PyTorch's checks, small."""

import importlib

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import tileloss
from tileloss.functional import paired_distance, paired_similarity, pairs_op
from tileloss.tiled.pairs import NORM_CLAMPS

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
SIZE, WIDTH, BLOCK = 2048, 64, 1 << 16


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def some_loss(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    angles = paired_similarity(a.tanh(), b, similarity="angle")
    return (angles - paired_similarity(a, [b, c]).sum(dim=1) + paired_distance(a, c, eps=1e-6)).relu().mean()


def value_and_gradients(loss_of, *inputs: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = loss_of(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize(
    ("compiler", "backend"), [("aot_eager", "tiled"), ("aot_eager", "reference"), ("inductor", "tiled")]
)
def test_one_graph_with_the_same_numbers(compiler: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_op, "_through_definition", None)  # it serves second derivatives alone
    monkeypatch.setattr(tileloss.backend, "_environment", backend)
    inputs = [torch.randn(20, 5) for _ in range(3)]
    compiled = torch.compile(some_loss, fullgraph=True, backend=compiler)
    for a, b in zip(value_and_gradients(compiled, *inputs), value_and_gradients(some_loss, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_one_graph_serves_every_batch_size() -> None:
    compiled = torch.compile(some_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (3, 20, 41):
        inputs = [torch.randn(size, 5) for _ in range(3)]
        with tileloss.use_backend("tiled"):
            torch.testing.assert_close(compiled(*inputs), some_loss(*inputs))


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, True), (False, True, False), (False,) * 3])
@pytest.mark.parametrize(
    ("dtype", "measure"), [(torch.float64, "cosine"), (torch.float32, "angle"), (torch.bfloat16, "euclidean")]
)
def test_opcheck(dtype: torch.dtype, measure: str, wanted: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(9, 4).to(dtype).requires_grad_(need) for need in wanted]
    # bfloat16 gradients agree to their own precision
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(
        torch.ops.tileloss.pairs.default, (matrices, measure, 0.0, "tiled"), test_utils=CHECKS, **tolerance
    )
    sums = torch.promote_types(dtype, torch.float32)
    d_found, found = torch.randn(2, 2, 9, dtype=sums)
    norms = torch.rand(3 if measure in NORM_CLAMPS else 0, 9, dtype=sums)
    torch.library.opcheck(
        torch.ops.tileloss.pairs_backward.default,
        (d_found, [x.detach() for x in matrices], found, norms, measure, 0.0, list(wanted), "tiled"),
        test_utils=CHECKS,
    )


def test_the_operator_and_the_eager_node_are_one() -> None:
    """What a compiler sees has the numbers of an eager call, and an exact second derivative too."""

    def operator(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return torch.ops.tileloss.pairs([a, b, c], "torch_cosine", 0.0, "tiled")[0].T

    def eager(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return paired_similarity(a, [b, c], similarity="torch_cosine", backend="tiled")

    inputs = [torch.randn(9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    derivatives = []
    for function in (operator, eager):
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), inputs)
        derivatives.append([*first, *second])
    for a, b in zip(*derivatives, strict=True):
        torch.testing.assert_close(a, b)


def peak_bytes(backend: str, **options: str) -> int:
    """The most that was allocated at one time during a forward and a backward, beside the inputs."""
    a, b, c = (torch.randn(SIZE, WIDTH, requires_grad=True) for _ in range(3))
    call = paired_similarity if "similarity" in options else paired_distance
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call(a, [b, c], **options, backend=backend).sum().backward()  # type: ignore[operator]
    peak = held = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    "options",
    [*({"similarity": name} for name in ("dot", *NORM_CLAMPS)), {"metric": "euclidean"}, {"metric": "manhattan"}],
    ids=lambda options: "-".join(options.values()),
)
def test_nothing_of_the_inputs_size_beside_the_gradients(
    options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(importlib.import_module("tileloss.tiled.pairs")._BLOCK_BYTES, "cpu", BLOCK)
    matrix = SIZE * WIDTH * 4
    assert peak_bytes("tiled", **options) <= 3 * matrix + 20 * SIZE * 4 + 3 * BLOCK
    assert peak_bytes("reference", **options) > 3.9 * matrix, "or the measurement sees nothing"
