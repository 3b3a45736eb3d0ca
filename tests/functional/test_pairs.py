"""Paired similarities and distances: over every backend the definition's values and gradients, no less exact."""

import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tileloss import reference
from tileloss.errors import DeviceError, DtypeError, InputError, ShapeError
from tileloss.functional import paired_distance, paired_similarity

pairs_module = importlib.import_module("tileloss.functional.pairs")
tiled = importlib.import_module("tileloss.tiled.pairs")

SHAPES = list(itertools.product([1, 2, 63, 100, 257], [1, 3, 65]))
SIMILARITIES = ("cosine", "torch_cosine", "dot", "angle", "euclidean", "manhattan")
METRICS = ("euclidean", "squared_euclidean", "manhattan", "cosine", "torch_cosine")
CALLS: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
    *((paired_similarity, {"similarity": name}) for name in SIMILARITIES),
    *((paired_distance, {"metric": name}) for name in METRICS),
    *((paired_distance, {"metric": name, "eps": 1e-6}) for name in METRICS[:3]),
]
NAMES = ["-".join(map(str, options.values())) + f"-{function.__name__}" for function, options in CALLS]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiled._BLOCK_BYTES, "cpu", 7 * 65 * 8)


def matrices(size: int, width: int, count: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, width).to(dtype) for _ in range(count)]


def all_of(
    inputs: Sequence[Tensor], call: Callable[..., Tensor], options: dict[str, Any], backend: str
) -> list[Tensor]:
    """Values, and the gradients of a weighted sum; of one other matrix by itself, of several as a sequence."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    found = call(leaves[0], leaves[1] if len(leaves) == 2 else leaves[1:], **options, backend=backend)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [found.detach(), *torch.autograd.grad(found, leaves, weights.to(found.dtype))]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(("call", "options"), CALLS, ids=NAMES)
def test_blocks_agree_with_the_definition(call: Callable[..., Tensor], options: dict[str, Any], count: int) -> None:
    for size, width in SHAPES:
        inputs = matrices(size, width, count)
        found, expected = (all_of(inputs, call, options, name) for name in ("tiled", "reference"))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("call", "options"), CALLS, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_eager(dtype: torch.dtype, call: Callable[..., Tensor], options: dict[str, Any]) -> None:
    for (size, width), count in itertools.product(((63, 3), (257, 65)), (2, 3)):
        inputs = matrices(size, width, count, dtype)
        truth = all_of([x.double() for x in inputs], call, options, "reference")
        eager, found = (all_of(inputs, call, options, name) for name in ("reference", "tiled"))
        assert [x.dtype for x in found] == [torch.float32] + [dtype] * count
        for part, exact in enumerate(truth):
            errors = [((x[part].double() - exact).norm() / exact.norm()).item() for x in (found, eager)]
            assert errors[0] <= 3 * errors[1] + (1e-4 if part else 1e-5), (part, size, width)


@pytest.mark.parametrize(("call", "options"), CALLS, ids=NAMES)
def test_zero_tiny_and_equal_rows(call: Callable[..., Tensor], options: dict[str, Any]) -> None:
    """Row for row, for the gradients of rows near zero are large."""
    a, b, c = matrices(12, 5, 3)
    a[0], b[1], a[2], b[2], a[3], c[7] = 0.0, 0.0, 0.0, 0.0, b[3], a[7]
    a[4], b[5], a[6], b[6] = 1e-9 * a[4], 1e-10 * b[5], 1e-14 * a[6], 1e-13 * b[6]
    for inputs in ((a, b), (a, b, c)):
        found, expected = (all_of(inputs, call, options, name) for name in ("tiled", "reference"))
        for x, y in zip(found, expected, strict=True):
            assert x.isfinite().all()
            scale = y.abs() if y.ndim == 1 or y is expected[0] else y.norm(dim=1, keepdim=True)
            assert ((x - y).abs() <= 1e-9 * scale + 1e-12).all()


@pytest.mark.parametrize(("call", "options"), CALLS, ids=NAMES)
def test_a_nan_is_seen(call: Callable[..., Tensor], options: dict[str, Any]) -> None:
    a, b = matrices(9, 5)
    a[4, 1] = float("nan")
    found, expected = (all_of([a, b], call, options, name) for name in ("tiled", "reference"))
    assert found[0][4].isnan()
    assert found[0].isnan().sum() == 1
    assert torch.equal(found[2].isnan().any(dim=1), expected[2].isnan().any(dim=1))


def test_strides_and_expanded_rows(backend: str) -> None:
    a, b = matrices(20, 16)
    for call, options in CALLS:
        expected = all_of([a[:, ::2].contiguous(), b[::2].repeat(2, 1)[:, :8].contiguous()], call, options, backend)
        found = all_of([a[:, ::2].T.contiguous().T, b[::2].repeat(2, 1)[:, :8]], call, options, backend)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        row = b[:1].clone().requires_grad_()
        values = [call(a, other, **options) for other in (row, row.expand(20, -1), row.repeat(20, 1))]
        gradients = [torch.autograd.grad(value.sum(), row)[0] for value in values]
        for x, y in zip(values[:2] + gradients[:2], 2 * values[2:] + 2 * gradients[2:], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(call(row, [a, b], **options), call(row.repeat(20, 1), [a, b], **options))


def test_an_expanded_matrix_is_not_copied() -> None:
    from torch.profiler import ProfilerActivity, profile

    row, a = torch.randn(1, 64), torch.randn(2000, 64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        paired_distance(a, row, metric="squared_euclidean", backend="tiled")
    largest = max(e.nbytes() for e in trace.profiler.kineto_results.events() if e.name() == "[memory]")
    assert largest < a.nbytes / 10


def test_some_gradients_are_wanted(backend: str) -> None:
    for call, options in CALLS:
        inputs = matrices(20, 7, 4)
        every = all_of(inputs, call, options, backend)
        for wanted in itertools.product([False, True], repeat=4):
            leaves = [x.clone().requires_grad_(need) for x, need in zip(inputs, wanted, strict=True)]
            found = call(leaves[0], leaves[1:], **options)
            assert found.requires_grad == any(wanted)
            if not any(wanted):
                continue
            weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            found.backward(weights)
            for x, need, expected in zip(leaves, wanted, every[1:], strict=True):
                assert (x.grad is not None) == need
                if need:
                    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)


def test_a_matrix_with_itself(backend: str) -> None:
    """Both gradients go to it."""
    x = matrices(20, 7)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(paired_similarity(x, x, similarity="dot").sum(), x)
    torch.testing.assert_close(gradient, 2 * x.detach())
    assert not torch.autograd.grad(paired_distance(x, x).sum(), x)[0].any()


@pytest.mark.parametrize(("call", "options"), CALLS, ids=NAMES)
def test_gradients_are_finite_differences(call: Callable[..., Tensor], options: dict[str, Any]) -> None:
    inputs = tuple(x.requires_grad_() for x in matrices(3, 3, 3))
    torch.autograd.gradcheck(lambda a, *others: call(a, others, **options, backend="tiled"), inputs)
    torch.autograd.gradgradcheck(lambda a, *others: call(a, others, **options, backend="tiled"), inputs)


@pytest.mark.parametrize("related", [lambda x: x, lambda x: 2 * x.flip(1) + x, lambda x: x.detach()])
def test_second_derivative_of_inputs_that_share_a_source(related: Callable[[Tensor], Tensor], backend: str) -> None:
    def derivatives(name: str) -> tuple[Tensor, Tensor]:
        x = matrices(9, 4)[0].requires_grad_()
        found = paired_similarity(x, [related(x), related(x).tanh()], backend=name)
        (first,) = torch.autograd.grad(found.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return first, second

    for a, b in zip(derivatives(backend), derivatives("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_two_backwards_add_up(backend: str) -> None:
    a, b = (x.requires_grad_() for x in matrices(9, 4))
    found = paired_similarity(a, b).sum()
    first = torch.autograd.grad(found, (a, b), retain_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(found, (a, b)), first, strict=True))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_inputs_of_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype], backend: str) -> None:
    for call, options in CALLS:
        for one, other in (dtypes, dtypes[::-1]):
            inputs = [x.to(dtype) for x, dtype in zip(matrices(9, 4), (one, other), strict=True)]
            found = all_of(inputs, call, options, backend)
            assert [x.dtype for x in found] == [dtypes[1], one, other]
            exact = all_of([x.double() for x in inputs], call, options, "reference")
            for x, y in zip(found, exact, strict=True):
                assert (x.double() - y).norm() <= 1e-2 * y.norm()


def test_an_empty_batch(backend: str) -> None:
    for call, options in CALLS:
        assert call(torch.randn(0, 4), torch.randn(0, 4), **options).shape == (0,)
        assert call(torch.randn(0, 4), [torch.randn(1, 4)] * 2, **options).shape == (0, 2)
        assert call(torch.randn(3, 0), torch.randn(3, 0), **options).shape == (3,)


def test_small_batches_of_products_take_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    measured = pairs_module.block_pairs
    monkeypatch.setattr(pairs_module, "block_pairs", lambda *inputs: called.append(inputs) or measured(*inputs))
    cases = ((4096, "dot", 0), (4097, "dot", 1), (640, "euclidean", 1), (641, "euclidean", 2), (1, "cosine", 3))
    for size, similarity, blocks in cases:
        paired_similarity(*matrices(size, 256, dtype=torch.float32), similarity=similarity)
        assert len(called) == blocks


@pytest.mark.parametrize(("size", "columns", "stacked"), [(32, 4, True), (33, 4, False), (32, 2, False)])
def test_few_numbers_of_many_matrices_are_stacked(
    size: int, columns: int, stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dimensions = []
    measure = reference.paired_measure
    monkeypatch.setattr(
        reference, "paired_measure", lambda a, b, *options: dimensions.append(b.ndim) or measure(a, b, *options)
    )
    a, *others = [x.requires_grad_() for x in matrices(size, 256, 1 + columns, torch.float32)]
    found = paired_similarity(a, others, similarity="dot")
    assert dimensions == ([3] if stacked else [2] * columns)
    torch.testing.assert_close(found, torch.stack([(a * x).sum(dim=1) for x in others], dim=1))
    gradients = torch.autograd.grad(found.sum(), [a, *others])
    for gradient, expected in zip(gradients, [sum(others), *[a] * columns], strict=True):
        torch.testing.assert_close(gradient, expected)


def test_two_runs_give_the_same_bits() -> None:
    inputs = matrices(500, 65, 3, torch.float32)
    for call, options in CALLS:
        first, second = (all_of(inputs, call, options, "tiled") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_permuting_the_rows_permutes_the_gradients(backend: str) -> None:
    a, b = matrices(40, 9)
    order = torch.randperm(40)
    for call, options in CALLS:
        leaves = [x.clone().requires_grad_() for x in (a, b, a[order], b[order])]
        values = [call(*leaves[:2], **options), call(*leaves[2:], **options)]
        gradients = torch.autograd.grad(values[0].sin().sum() + values[1].sin().sum(), leaves)
        for x, y in ((values[0], values[1]), (gradients[0], gradients[2]), (gradients[1], gradients[3])):
            torch.testing.assert_close(x[order], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backward_too", [False, True])
def test_autocast_changes_nothing(backward_too: bool, backend: str) -> None:
    leaves = [x.requires_grad_() for x in matrices(20, 8, dtype=torch.float32)]
    for call, options in CALLS:
        results = []
        for enabled in (True, False):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                found = call(*leaves, **options)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled and backward_too):
                results.append([found, *torch.autograd.grad(found.sum(), leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_sparse_inputs_are_made_dense(backend: str) -> None:
    a, b = matrices(9, 4)
    assert torch.equal(paired_similarity(a.to_sparse(), b), paired_similarity(a, b))


ROWS = torch.randn(4, 3)
WRONG: list[tuple[type[Exception], tuple[Any, Any], dict[str, Any], str]] = [
    (ShapeError, (ROWS, torch.randn(4, 5)), {}, "Rows of a have 3 numbers and rows of b 5"),
    (ShapeError, (ROWS, torch.randn(3, 3)), {}, "a has 4 rows and b 3"),
    (ShapeError, (ROWS, [ROWS, torch.randn(3, 3)]), {}, r"a has 4 rows and b\[1\] 3"),
    (ShapeError, (ROWS[:1], [ROWS, torch.randn(3, 3)]), {}, r"have \[1, 4, 3\] rows"),
    (ShapeError, (torch.randn(4), ROWS), {}, "a must be a matrix of embeddings"),
    (DtypeError, (ROWS, torch.ones(4, 3).long()), {}, "b must hold floating-point numbers"),
    (DeviceError, (ROWS, torch.empty(4, 3, device="meta")), {}, "move both to one device"),
    (InputError, ([[1.0]], ROWS), {}, "a must be a tensor, got list"),
    (InputError, (ROWS, []), {}, "nothing to compare"),
    (TypeError, (ROWS, None), {}, "b must be a tensor or a sequence of tensors, got None"),
    (TypeError, (ROWS, ROWS), {"metric": "manhattan", "eps": "0"}, "eps must be a finite number, got '0'"),
    (InputError, (ROWS, ROWS), {"metric": "manhattan", "eps": float("nan")}, "eps must be a finite number, got nan"),
    (InputError, (ROWS, ROWS), {"similarity": "squared_euclidean"}, "similarity must be one of"),
    (InputError, (ROWS, ROWS), {"metric": "dot"}, "metric must be one of"),
    (InputError, (ROWS, ROWS), {"backend": "cuda"}, "must be 'auto' or one of"),
]


@pytest.mark.parametrize(("kind", "inputs", "options", "message"), WRONG, ids=[m for *_, m in WRONG])
def test_bad_input(kind: type[Exception], inputs: tuple[Any, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(kind, match=message):
        (paired_distance if "metric" in options else paired_similarity)(*inputs, **options)
