"""Distances and similarities, and their way back, in Triton: against differences in float64, on raw and odd inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tileloss import reference
from tileloss.functional import pairwise_distance, pairwise_similarity
from tileloss.kernels.pairwise import pairwise_matrix
from tileloss.kernels.pairwise_backward import pairwise_matrix_backward
from tileloss.metrics import METRICS

DTYPES = [torch.float32, torch.float16]


def by_differences(a: Tensor, b: Tensor, metric: str, similarity: bool) -> Tensor:
    if metric in ("cosine", "dot"):
        found = F.normalize(a) @ F.normalize(b).T if metric == "cosine" else a @ b.T
        return found if similarity else (metric == "cosine") * 1.0 - found
    difference = a[:, None] - b[None]
    if metric == "manhattan":
        found = difference.abs().sum(dim=2)
    else:
        squares = difference.square().sum(dim=2)
        nonzero = squares > 0
        found = squares if metric == "squared_euclidean" else torch.where(nonzero, squares, 1.0).sqrt() * nonzero
    return -found if similarity else found


def with_gradients(matrix_of, weights: Tensor, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    matrix = matrix_of(*leaves)
    return [matrix.detach(), *torch.autograd.grad(matrix, leaves, weights.to(matrix.dtype))]


def in_triton(weights: Tensor, metric: str, similarity: bool, *inputs: Tensor) -> list[Tensor]:
    a, b = inputs if len(inputs) == 2 else (inputs[0], None)
    matrix = pairwise_matrix(a, b, metric, similarity)
    needs = (True, b is not None)
    found = pairwise_matrix_backward(weights.to(matrix.dtype), a, b, matrix, metric, similarity, needs)
    return [matrix, *(x for x in found if x is not None)]


def error(found: Tensor, truth: Tensor) -> float:
    norm = truth.double().norm()
    return float((found.double() - truth.double()).norm() / (norm if norm > 0 else 1.0))


def errors(metric: str, similarity: bool, weights: Tensor, *inputs: Tensor) -> list[tuple[float, float]]:
    """Of the matrix and of each gradient: the kernels' error, and that of the definition in the same dtype."""

    def matrix_of(definition):
        def pick(a: Tensor, b: Tensor | None = None) -> Tensor:
            return definition(a, b)

        return pick

    exact = with_gradients(
        matrix_of(lambda a, b: by_differences(a, a if b is None else b, metric, similarity)),
        weights, *(x.double() for x in inputs),
    )  # fmt: skip
    eager = with_gradients(
        matrix_of(lambda a, b: reference.pairwise_matrix(a, b, metric, similarity)), weights, *inputs
    )
    found = in_triton(weights, metric, similarity, *inputs)
    assert found[0].dtype == torch.float32
    assert [x.dtype for x in found] == [x.dtype for x in eager]
    return [(error(x, truth), error(y, truth)) for x, y, truth in zip(found, eager, exact, strict=True)]


def check(metric: str, similarity: bool, *draws: tuple[Tensor, ...]) -> None:
    """The numerics rule: three times the error of the definition in the same dtype, and a little.

    The errors are the largest of the draws, of weights and inputs each: on a single small one all roundings of the
    definition may happen to cancel.
    """
    for place, pairs in enumerate(zip(*(errors(metric, similarity, *draw) for draw in draws), strict=True)):
        ours, definition = (max(side) for side in zip(*pairs, strict=True))
        assert ours <= 3 * definition + (1e-4 if place else 1e-5), place


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("similarity", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 2, 3), (63, 100, 65)])
def test_two_matrices(
    n: int, m: int, d: int, metric: str, similarity: bool, dtype: torch.dtype, device: torch.device,
    poisoned_empty: None,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    draws = []
    for _ in range(8 if n == 1 else 1):
        inputs = torch.randn(n, d, device=device).to(dtype), torch.randn(m, d, device=device).to(dtype)
        draws.append((torch.randn(n, m, device=device), *inputs))
    check(metric, similarity, *draws)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("similarity", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_a_batch_with_itself(
    metric: str, similarity: bool, dtype: torch.dtype, device: torch.device, poisoned_empty: None
) -> None:
    torch.manual_seed(0)
    x = torch.randn(67, 33, device=device).to(dtype)
    x[5] = x[2]
    weights = torch.randn(67, 67, device=device)
    if metric == "cosine":  # whose gradient at equal rows is zero, and rounding in the truth
        weights[5, 2] = weights[2, 5] = 0.0
    check(metric, similarity, (weights, x))
    found, gradient = in_triton(torch.eye(67, device=device), metric, similarity, x)
    if metric != "dot" and not (metric == "cosine" and similarity):
        assert not found.diagonal().any()
        assert not gradient.any()
    if metric in ("euclidean", "squared_euclidean", "manhattan"):
        assert found[2, 5] == found[5, 2] == 0.0


@pytest.mark.parametrize(("size", "grad"), [(1e3, 1e-6), (1e-2, 1e3)])
@pytest.mark.parametrize("metric", METRICS)
def test_float16_takes_gradients_of_any_size(metric: str, size: float, grad: float, device: torch.device) -> None:
    """Weights of 1e-6, as those of a mean are, lose their digits in float16; those of near rows overflow it."""
    torch.manual_seed(0)
    a, b = ((size * torch.randn(rows, 17, device=device)).half() for rows in (40, 70))
    # rows' gradients between 1e-4 and 1e4, which float16 holds; among the weights are much smaller ones
    weights = torch.randn(40, 70, device=device) * grad * torch.logspace(-4, 0, 70, device=device)
    if metric == "cosine":
        weights *= size
    if metric in ("euclidean", "manhattan"):
        weights *= max(size, 1.0)
    check(metric, False, (weights, a, b))


@pytest.mark.parametrize("metric", METRICS)
def test_any_strides(metric: str, device: torch.device) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(20, 66, device=device)[:, ::2], torch.randn(33, 1, device=device).expand(-1, 40).t()
    expanded, turned = torch.randn(40, device=device).expand(20, 40), torch.randn(40, 20, device=device).t()
    for weights in (expanded, turned, torch.ones((), device=device).expand(20, 40)):
        check(metric, False, (weights, a, b))


@pytest.mark.parametrize("metric", METRICS)
def test_only_what_is_needed(metric: str, device: torch.device) -> None:
    a, b = torch.randn(2, 9, 4, device=device)
    matrix = pairwise_matrix(a, b, metric, False)
    both = pairwise_matrix_backward(matrix, a, b, matrix, metric, False, (True, True))
    for needs in ((True, False), (False, True)):
        some = pairwise_matrix_backward(matrix, a, b, matrix, metric, False, needs)
        for ours, all_, need in zip(some, both, needs, strict=True):
            assert ours is None if not need else torch.equal(ours, all_)


def test_zero_rows_and_tiny_ones_have_the_norm_that_the_clamp_gives_them(device: torch.device) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 9, 6, device=device)
    a[1] = 0.0
    b[2] *= 1e-14
    check("cosine", True, (torch.randn(9, 9, device=device), a, b))


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_through_the_public_functions(metric: str, within: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(20, 7, device=device)] + [torch.randn(35, 7, device=device)] * (not within)
    weights = torch.randn(20, 20 if within else 35, device=device)
    for function, name in ((pairwise_distance, "metric"), (pairwise_similarity, "similarity")):
        found, definition = (
            with_gradients(lambda *x, f=function, o={name: metric, "backend": backend}: f(*x, **o), weights, *inputs)
            for backend in ("triton", "reference")
        )
        for ours, expected in zip(found, definition, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    again = with_gradients(lambda *x: pairwise_distance(*x, metric=metric, backend="triton"), weights, *inputs)
    first = with_gradients(lambda *x: pairwise_distance(*x, metric=metric, backend="triton"), weights, *inputs)
    assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))


def test_mixed_dtypes(device: torch.device) -> None:
    torch.manual_seed(0)
    weights, a, b = (torch.randn(shape, device=device) for shape in ((9, 8), (9, 4), (8, 4)))
    check("euclidean", False, (weights, a.half(), b))


@pytest.mark.parametrize("metric", METRICS)
def test_opcheck(metric: str, device: torch.device) -> None:
    a, b = torch.randn(9, 4, device=device, requires_grad=True), torch.randn(7, 4, device=device, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for other in (b, None):
        arguments = (a, other, metric, False, "triton")
        torch.library.opcheck(torch.ops.tileloss.pairwise.default, arguments, test_utils=checks)


@pytest.mark.parametrize("metric", ["euclidean", "squared_euclidean"])
def test_an_infinite_row_is_near_nothing(metric: str, device: torch.device) -> None:
    rows = torch.ones(9, 2, device=device)
    rows[4, 0] = float("inf")
    assert not pairwise_matrix(rows, torch.ones(9, 2, device=device), metric, False)[4].isfinite().any()
