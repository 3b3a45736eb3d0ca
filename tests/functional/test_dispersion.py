"""Dispersion: over every backend the definition's values and gradients, no less exact."""

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tileloss
from tileloss.errors import BackendError, DtypeError, FallbackWarning, InputError, ShapeError
from tileloss.functional import Dispersion, dispersion
from tileloss.similarity import cos_sim, dot_score, euclidean_sim

dispersion_module = importlib.import_module("tileloss.functional.dispersion")

SIZES = (1, 2, 63, 100, 257)
WIDTHS = (1, 3, 65)
PRODUCTS = ("cosine", "torch_cosine", "dot")


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch, small_blocks: int) -> None:
    """Prepare a few rows at a time."""
    monkeypatch.setattr(importlib.import_module("tileloss.tiled.dispersion"), "_PREPARED_BYTES", 1)


def batch(size: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows that have a direction in common, as embeddings have."""
    torch.manual_seed(0)
    return (torch.randn(size, width) + 0.5 * torch.randn(width)).to(dtype)


def values_and_gradients(rows: Tensor, similarity: Any, backend: str) -> list[Tensor]:
    """Both moments, and the gradient of each and of a mixture."""
    rows = rows.detach().requires_grad_()
    found = dispersion(rows, similarity=similarity, backend=backend)
    gradients = [
        torch.autograd.grad(weights[0] * found.mean + weights[1] * found.second_moment, rows, retain_graph=True)[0]
        for weights in ((1, 0), (0, 1), (0.3, -2))
    ]
    return [*(x.detach() for x in found), *gradients]


@pytest.mark.parametrize("similarity", PRODUCTS)
@pytest.mark.parametrize("size", SIZES)
def test_gram_matrices_agree_with_the_definition(size: int, similarity: str) -> None:
    for width in WIDTHS:
        rows = batch(size, width)
        found, expected = (values_and_gradients(rows, similarity, name) for name in ("tiled", "reference"))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def error(found: list[Tensor], truth: list[Tensor], part: int) -> float:
    return ((found[part].double() - truth[part]).norm() / truth[part].norm()).item()


@pytest.mark.parametrize("similarity", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("common", [0.0, 1.0])
def test_as_exact_as_eager(dtype: torch.dtype, similarity: str, common: float) -> None:
    for size in SIZES[1:]:
        for width in (3, 65, 256):
            rows = (batch(size, width) + common).to(dtype)
            truth = values_and_gradients(rows.double(), similarity, "reference")
            eager, found = (values_and_gradients(rows, similarity, name) for name in ("reference", "tiled"))
            assert [x.dtype for x in found] == [torch.float32, torch.float32, dtype, dtype, dtype]
            for part, slack in enumerate((1e-5, 1e-5, 1e-4, 1e-4, 1e-4)):
                errors = [
                    ((x[part].double() - truth[part]).norm() / truth[part].norm()).item() for x in (found, eager)
                ]
                assert errors[0] <= 3 * errors[1] + slack, (part, size, width)


@pytest.mark.parametrize("size", [66, 100, 257])
def test_little_is_lost_where_the_diagonal_is_most_of_the_sum(size: int) -> None:
    """Rows as spread out as can be, just above as many as columns: what is left of a subtraction of equals."""
    torch.manual_seed(0)
    rows = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0][:, :65].float()
    truth = values_and_gradients(rows.double(), "cosine", "reference")
    eager, found = (values_and_gradients(rows, "cosine", name) for name in ("reference", "tiled"))
    for part, slack in enumerate((1e-5, 1e-5, 1e-4, 1e-4, 1e-4)):
        assert error(found, truth, part) <= 3 * error(eager, truth, part) + slack, part


def test_moments_of_random_directions(backend: str) -> None:
    """A mean of zero and a second moment of 1/D, to the precision of a sample of 257."""
    found = dispersion(torch.randn(257, 65, dtype=torch.float64))
    assert abs(found.mean.item()) < 4 / 257
    assert math.isclose(found.second_moment.item(), 1 / 65, rel_tol=0.05)


@pytest.mark.parametrize("size", [40, 100])
def test_permutations_lengths_and_copies(size: int, backend: str) -> None:
    rows = batch(size, 65)
    expected = values_and_gradients(rows, "cosine", backend)
    shuffle, lengths = torch.randperm(size), torch.rand(size, 1, dtype=torch.float64) + 0.5
    found = values_and_gradients(rows[shuffle] * lengths, "cosine", backend)
    for a, b in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(a * lengths, b[shuffle], rtol=1e-9, atol=1e-13)
    mean, second_moment = dispersion(rows[:1].expand(size, -1))
    torch.testing.assert_close(mean, torch.ones_like(mean))
    torch.testing.assert_close(second_moment, torch.ones_like(mean))


@pytest.mark.parametrize("size", [9, 100])
def test_strides_do_not_matter(size: int, backend: str) -> None:
    rows = batch(size, 64)
    for layout in (rows[:, ::2], rows.T.contiguous().T, rows[::2], rows[:1].expand(size, -1)):
        found = values_and_gradients(layout, "dot", backend)
        for a, b in zip(found, values_and_gradients(layout.contiguous(), "dot", backend), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [9, 100])
@pytest.mark.parametrize("similarity", ["cosine", "torch_cosine"])
def test_zero_rows_have_the_clamped_gradient(size: int, similarity: str, backend: str) -> None:
    rows = batch(size, 20)
    rows[3], rows[5] = 0.0, rows[5] * 1e-14
    found, expected = (values_and_gradients(rows, similarity, name) for name in (backend, "reference"))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert found[2][3].norm() > 1e3


def test_an_empty_batch(backend: str) -> None:
    rows = torch.randn(0, 4, requires_grad=True)
    found = dispersion(rows)
    assert [x.item() for x in found] == [0.0, 0.0]
    (found.mean + found.second_moment).backward()
    assert rows.grad is not None


def test_embeddings_of_no_width_are_all_alike(backend: str) -> None:
    assert [x.item() for x in dispersion(torch.empty(100, 0))] == [0.0, 0.0]


@pytest.mark.parametrize("size", [9, 100])
def test_a_nan_is_seen(size: int, backend: str) -> None:
    rows = batch(size, 20)
    rows[4, 0] = float("nan")
    assert all(x.isnan() for x in dispersion(rows))


@pytest.mark.parametrize("width", [33, 600])
def test_two_runs_give_the_same_bits(width: int) -> None:
    rows = batch(500, width, torch.float32)
    first, second = (values_and_gradients(rows, "cosine", "tiled") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("size", [3, 9])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_gradients_are_finite_differences(size: int, similarity: str, backend: str) -> None:
    rows = batch(size, 4).requires_grad_()
    torch.autograd.gradcheck(lambda x: tuple(dispersion(x, similarity=similarity)), rows)
    torch.autograd.gradgradcheck(lambda x: tuple(dispersion(x, similarity=similarity)), rows)


def test_second_derivative_through_a_source(backend: str) -> None:
    """The gradient of rows that were computed from something reaches that once."""

    def derivatives(name: str) -> list[Tensor]:
        source = batch(9, 4).requires_grad_()
        found = dispersion(source.tanh() * source.detach(), backend=name)
        (first,) = torch.autograd.grad(found.mean.square() + found.second_moment, source, create_graph=True)
        return [first.detach(), *torch.autograd.grad(first.square().sum(), source)]

    for a, b in zip(derivatives(backend), derivatives("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [20, 100])
def test_autocast_changes_nothing(size: int, backend: str) -> None:
    """Forward on either backend; backward where it is ours, for autograd's own is narrowed where it runs."""
    rows = batch(size, 33, torch.float32).requires_grad_()
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = dispersion(rows)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled and backend == "tiled"):
            results.append([*found, *torch.autograd.grad(found.mean + found.second_moment, rows)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_small_batches_take_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 256 rows on a CPU."""
    called = []
    monkeypatch.setattr(
        dispersion_module, "gram_dispersion", lambda *inputs: called.append(inputs) or (inputs[0].sum(),) * 4
    )
    for size, blocks in ((64, 0), (256, 0), (257, 1)):
        dispersion(batch(size, 5))
        assert len(called) == blocks


def shifted(a: Tensor, b: Tensor) -> Tensor:
    return cos_sim(a, b) + a[:, :1].tanh()


@pytest.mark.parametrize("similarity", ["euclidean", "manhattan", shifted])
def test_other_similarities_are_materialised_and_said_so(similarity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = batch(300, 5)
    monkeypatch.setattr(tileloss.backend, "_said", set())
    with pytest.warns(FallbackWarning, match="takes all similarities at once"):
        found = values_and_gradients(rows, similarity, "auto")
    for a, b in zip(found, values_and_gradients(rows, similarity, "reference"), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(BackendError, match="only by 'cosine' and 'dot'"):
        dispersion(rows, similarity=similarity, backend="tiled")


def test_stock_functions_are_recognised() -> None:
    rows = batch(100, 5)
    for function, name in ((cos_sim, "cosine"), (dot_score, "dot")):
        found, expected = (dispersion(rows, similarity=s, backend="tiled") for s in (function, name))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(BackendError):
        dispersion(rows, similarity=euclidean_sim, backend="tiled")


def test_a_callable_may_return_what_cannot_be_written_to(backend: str) -> None:
    def constant(a: Tensor, b: Tensor) -> Tensor:
        return a[0, :1].expand(len(a), len(b))

    rows = batch(9, 5)
    found = dispersion(rows, similarity=constant, backend="reference")
    torch.testing.assert_close(found, Dispersion(rows[0, 0], rows[0, 0].square()))


def test_sparse_rows_are_made_dense(backend: str) -> None:
    rows = batch(40, 5)
    for a, b in zip(dispersion(rows.to_sparse()), dispersion(rows), strict=True):
        assert torch.equal(a, b)


def too_narrow(a: Tensor, b: Tensor) -> Tensor:
    return a.sum(dim=1)


WRONG: list[tuple[type[Exception], Any, dict[str, Any], str]] = [
    (InputError, [[1.0]], {}, "embeddings must be a tensor, got list"),
    (ShapeError, torch.randn(4), {}, "embeddings must be a matrix of embeddings"),
    (DtypeError, torch.ones(4, 3).long(), {}, "embeddings must hold floating-point numbers"),
    (InputError, torch.randn(4, 3), {"similarity": "angle"}, "similarity must be one of"),
    (ShapeError, torch.randn(4, 3), {"similarity": too_narrow}, r"must return a \(4, 4\) matrix for 4 rows, got \(4,"),
    (InputError, torch.randn(4, 3), {"backend": "cuda"}, "must be 'auto' or one of"),
]


@pytest.mark.parametrize(("kind", "rows", "options", "message"), WRONG, ids=[m for *_, m in WRONG])
def test_bad_input(kind: type[Exception], rows: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(kind, match=message):
        dispersion(rows, **options)
