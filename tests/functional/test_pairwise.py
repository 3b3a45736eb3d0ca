"""Distance and similarity matrices on every backend: the oracle's numbers, gradients, shapes, dtypes and errors."""

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import util
from sentence_transformers.sentence_transformer.losses import BatchHardTripletLossDistanceFunction
from torch import Tensor

import tileloss
from tileloss import errors
from tileloss.functional import pairwise_distance, pairwise_similarity
from tileloss.metrics import METRICS

ORACLE_SIMILARITIES = {
    "cosine": util.cos_sim,
    "dot": util.dot_score,
    "euclidean": util.euclidean_sim,
    "manhattan": util.manhattan_sim,
}
SHAPES = [(1, 1, 3), (2, 63, 1), (63, 100, 65), (100, 2, 3), (257, 70, 65)]


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def by_differences(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """Distances the long way round, through the differences of all rows."""
    if metric == "cosine":
        return 1.0 - F.normalize(a) @ F.normalize(b).T
    if metric == "dot":
        return -(a @ b.T)
    difference = a[:, None] - b[None]
    if metric == "manhattan":
        return difference.abs().sum(dim=2)
    squares = difference.square().sum(dim=2)
    return squares if metric == "squared_euclidean" else torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)


def value_and_gradients(matrix_of, weights: Tensor, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    matrix = matrix_of(*leaves)
    return [matrix.detach(), *torch.autograd.grad((matrix * weights.to(matrix.dtype)).sum(), leaves)]


def error(found: Tensor, truth: Tensor) -> float:
    """Relative, as norms; of a truth that is zero, absolute."""
    norm = truth.double().norm()
    return float((found.double() - truth.double()).norm() / (norm if norm > 0 else 1.0))


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-8), (torch.float32, 2e-4)])
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
@pytest.mark.parametrize("similarity", ORACLE_SIMILARITIES)
def test_the_oracle_has_the_same_similarities(
    similarity: str, n: int, m: int, d: int, dtype: torch.dtype, allowed: float, backend: str
) -> None:
    torch.manual_seed(0)
    a, b, weights = rows(n, d, dtype=dtype), rows(m, d, dtype=dtype), rows(n, m)
    found = value_and_gradients(lambda a, b: pairwise_similarity(a, b, similarity=similarity), weights, a, b)
    expected = value_and_gradients(ORACLE_SIMILARITIES[similarity], weights, a, b)
    for part, ours, theirs in zip(("value", "a", "b"), found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        if similarity == "cosine" and d == 1 and part != "value":  # a sign, whose gradient is rounding and no more
            assert ours.abs().max() < 1e4 * torch.finfo(dtype).eps * weights.abs().sum()
            continue
        assert error(ours, theirs) < allowed, part


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-8), (torch.float32, 2e-4)])
@pytest.mark.parametrize("metric", ["euclidean", "squared_euclidean", "cosine"])
@pytest.mark.parametrize("size", [1, 2, 63, 100])
def test_the_oracle_has_the_same_distances_within_a_batch(
    size: int, metric: str, dtype: torch.dtype, allowed: float, backend: str
) -> None:
    torch.manual_seed(0)
    x, weights = rows(size, 5, dtype=dtype), rows(size, size)
    if size > 2:  # of two equal rows alone the gradient would be rounding
        x[-1] = x[0]
    theirs = BatchHardTripletLossDistanceFunction
    oracle = {
        "euclidean": theirs.euclidean_distance,
        "squared_euclidean": lambda x: theirs.euclidean_distance(x, squared=True),
        "cosine": theirs.cosine_distance,
    }[metric]
    found = value_and_gradients(lambda x: pairwise_distance(x, metric=metric), weights, x)
    expected = value_and_gradients(oracle, weights, x)
    assert torch.equal(found[0].diagonal(), torch.zeros(size, dtype=dtype))
    if size == 1:  # nothing but a row and itself: the gradient is zero, or the oracle's rounding
        assert not found[1].any()
        return
    for part, ours, truth in zip(("value", "gradient"), found, expected, strict=True):
        assert error(ours, truth) < allowed, part


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("as_similarity", [False, True])
def test_no_less_exact_than_the_definition(
    metric: str, within: bool, as_similarity: bool, dtype: torch.dtype, small_blocks: int
) -> None:
    """The blocks against differences in float64, and beside them the definition in the same dtype."""
    torch.manual_seed(0)
    inputs = [rows(63, 65, dtype=dtype)] + [rows(100, 65, dtype=dtype)] * (not within)
    weights = rows(63, 63 if within else 100)

    def ours(backend: str):
        def matrix_of(*inputs: Tensor) -> Tensor:
            if as_similarity:
                return pairwise_similarity(*inputs, similarity=metric, backend=backend)
            return pairwise_distance(*inputs, metric=metric, backend=backend)

        return matrix_of

    def truth(a: Tensor, b: Tensor | None = None) -> Tensor:
        distances = by_differences(a, a if b is None else b, metric)
        if metric == "cosine" and as_similarity:
            return 1.0 - distances
        return -distances if as_similarity else distances

    expected = value_and_gradients(truth, weights, *(x.double() for x in inputs))
    found = value_and_gradients(ours("tiled"), weights, *inputs)
    eager = value_and_gradients(ours("reference"), weights, *inputs)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for place, (blocks, definition, exact) in enumerate(zip(found, eager, expected, strict=True)):
        assert blocks.dtype == definition.dtype
        extra = 1e-12 if dtype == torch.float64 else 1e-4 if place else 1e-5
        assert error(blocks, exact) <= 3 * error(definition, exact) + extra


@pytest.mark.parametrize("metric", ["euclidean", "squared_euclidean", "cosine", "manhattan"])
def test_within_a_batch_the_diagonal_is_zero_and_silent(metric: str, backend: str) -> None:
    torch.manual_seed(0)
    x = 100.0 + rows(20, 384, dtype=torch.float32)
    x[3] = 0.0
    found, gradient = value_and_gradients(lambda x: pairwise_distance(x, metric=metric), torch.eye(20), x)
    assert not found.diagonal().any()
    assert not gradient.any()


@pytest.mark.parametrize("metric", ["euclidean", "squared_euclidean"])
def test_equal_rows_of_two_matrices_are_at_zero_with_gradient_zero(metric: str, backend: str) -> None:
    torch.manual_seed(0)
    x = rows(20, 384, dtype=torch.float32) + 1.0
    found, *gradients = value_and_gradients(
        lambda a, b: pairwise_distance(a, b, metric=metric), torch.eye(20), x, x.clone()
    )
    assert not found.diagonal().any()
    assert (found + torch.eye(20) > 0).all()
    for gradient in gradients:
        assert gradient.abs().max() <= (0.0 if metric == "euclidean" else 1e-4)


def test_where_numbers_are_equal_manhattan_has_gradient_zero(backend: str) -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 5.0]])
    _, d_a, d_b = value_and_gradients(lambda a, b: pairwise_distance(a, b, metric="manhattan"), torch.ones(1, 1), a, b)
    assert torch.equal(d_a, torch.tensor([[0.0, -1.0]]))
    assert torch.equal(d_b, torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("metric", METRICS)
def test_within_is_a_batch_against_its_copy(metric: str, backend: str) -> None:
    torch.manual_seed(0)
    x, weights = rows(30, 4), rows(30, 30).fill_diagonal_(0.0)
    found, gradient = value_and_gradients(lambda x: pairwise_distance(x, metric=metric), weights, x)
    expected, d_a, d_b = value_and_gradients(lambda a, b: pairwise_distance(a, b, metric=metric), weights, x, x)
    off_diagonal = ~torch.eye(30, dtype=torch.bool)
    torch.testing.assert_close(found[off_diagonal], expected[off_diagonal])
    torch.testing.assert_close(gradient, d_a + d_b)


@pytest.mark.parametrize("metric", METRICS)
def test_similarity_is_minus_the_distance_or_one_minus_it(metric: str, backend: str) -> None:
    torch.manual_seed(0)
    a, b, weights = rows(20, 4), rows(30, 4), rows(20, 30)
    distances = value_and_gradients(lambda a, b: pairwise_distance(a, b, metric=metric), weights, a, b)
    similarities = value_and_gradients(lambda a, b: pairwise_similarity(a, b, similarity=metric), weights, a, b)
    torch.testing.assert_close(similarities[0], float(metric == "cosine") - distances[0])
    for one, other in zip(similarities[1:], distances[1:], strict=True):
        torch.testing.assert_close(one, -other)


@pytest.mark.parametrize("metric", METRICS)
def test_any_strides(metric: str, backend: str) -> None:
    torch.manual_seed(0)
    wide = rows(20, 8)
    strided = {
        "columns": (wide[:, ::2], wide.flip(0)[:, 1::2]),
        "transposed": (rows(4, 20).t(), rows(4, 9).t()),
        "expanded": (rows(1, 4).expand(20, -1), rows(20, 1).expand(-1, 4)),
    }
    for name, (a, b) in strided.items():
        weights = rows(1, len(b)).expand(len(a), -1)
        found = value_and_gradients(lambda a, b: pairwise_distance(a, b, metric=metric), weights, a, b)
        dense = [x.contiguous() for x in (a, b)]
        expected = value_and_gradients(
            lambda a, b: pairwise_distance(a, b, metric=metric), weights.contiguous(), *dense
        )
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "m", "d"), [(0, 3, 4), (3, 0, 4), (0, 0, 4), (2, 3, 0)])
def test_nothing_gives_an_empty_matrix_or_zeros(metric: str, n: int, m: int, d: int, backend: str) -> None:
    a, b = rows(n, d), rows(m, d)
    found, *gradients = value_and_gradients(lambda a, b: pairwise_distance(a, b, metric=metric), rows(n, m), a, b)
    assert found.shape == (n, m)
    assert torch.equal(found, torch.full((n, m), float(metric == "cosine"), dtype=torch.float64))
    assert [x.shape for x in gradients] == [(n, d), (m, d)]
    assert not any(x.any() for x in gradients)
    assert pairwise_distance(a, metric=metric).shape == (n, n)


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("metric", METRICS)
def test_only_the_gradients_that_are_needed(metric: str, needed: tuple[bool, bool], backend: str) -> None:
    torch.manual_seed(0)
    a, b, weights = rows(20, 4), rows(30, 4), rows(20, 30)
    expected = value_and_gradients(lambda a, b: pairwise_distance(a, b, metric=metric), weights, a, b)[1:]
    leaves = [x.clone().requires_grad_(need) for x, need in zip((a, b), needed, strict=True)]
    matrix = pairwise_distance(*leaves, metric=metric)
    assert matrix.requires_grad == any(needed)
    if any(needed):
        matrix.backward(weights)
    for leaf, need, truth in zip(leaves, needed, expected, strict=True):
        assert (leaf.grad is None) != need
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, truth)


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_second_derivatives(metric: str, within: bool, backend: str) -> None:
    torch.manual_seed(0)
    inputs = [rows(5, 3).requires_grad_()] + [rows(4, 3).requires_grad_()] * (not within)

    def entries(*inputs: Tensor) -> Tensor:
        matrix = pairwise_distance(*inputs, metric=metric)
        if within:  # whose diagonal is constant, and not differentiable by differences
            matrix = matrix[~torch.eye(5, dtype=torch.bool)]
        return matrix

    assert torch.autograd.gradcheck(entries, inputs)
    assert torch.autograd.gradgradcheck(entries, inputs)


def test_of_a_gradient_whose_input_comes_from_the_other(backend: str) -> None:
    """b is made of a: the second derivative must not count that road twice."""
    a = rows(4, 3).requires_grad_()

    def through(distance) -> Tensor:
        b = a * a
        (gradient,) = torch.autograd.grad(distance(a, b).sum(), a, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), a)[0]

    torch.testing.assert_close(
        through(pairwise_distance), through(lambda a, b: by_differences(a, b, "euclidean")), rtol=1e-6, atol=1e-9
    )


def test_a_second_backward_gives_the_same_bits(backend: str) -> None:
    a, b = (rows(50, 7, dtype=torch.float32).requires_grad_() for _ in range(2))
    matrix = pairwise_distance(a, b)
    weights = torch.randn_like(matrix)
    first = torch.autograd.grad(matrix, (a, b), weights, retain_graph=True)
    kept = weights.clone()
    second = torch.autograd.grad(matrix, (a, b), weights)
    assert torch.equal(weights, kept), "the gradient that came in is the caller's"
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert torch.equal(matrix, pairwise_distance(a, b))


def test_autocast_narrows_nothing(backend: str) -> None:
    a, b = (rows(50, 64, dtype=torch.float32) for _ in range(2))
    weights = rows(50, 50)
    plain = value_and_gradients(pairwise_distance, weights, a, b)

    def under_autocast(a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return pairwise_distance(a, b)

    under = value_and_gradients(under_autocast, weights, a, b)
    for ours, expected in zip(under, plain, strict=True):
        torch.testing.assert_close(ours, expected)


def test_mixed_dtypes_and_sparse_rows(backend: str) -> None:
    a, b = rows(9, 4, dtype=torch.bfloat16), rows(8, 4, dtype=torch.float32)
    weights = rows(9, 8)
    found = value_and_gradients(pairwise_distance, weights, a, b)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.float32]
    expected = value_and_gradients(pairwise_distance, weights, a.float(), b)
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(pairwise_distance(b.to_sparse(), a), pairwise_distance(b, a))


@pytest.mark.parametrize(
    ("arguments", "options", "raised", "says"),
    [
        ((torch.ones(3),), {}, errors.ShapeError, "a must be a matrix"),
        ((torch.ones(3, 2), torch.ones(3)), {}, errors.ShapeError, "b must be a matrix"),
        ((torch.ones(3, 2), torch.ones(3, 4)), {}, errors.ShapeError, "have 2 numbers"),
        ((torch.ones(3, 2).long(),), {}, errors.DtypeError, "floating-point"),
        ((torch.ones(3, 2), torch.ones(3, 2).double()), {}, errors.DtypeError, "convert one"),
        ((torch.ones(3, 2), torch.ones(3, 2, device="meta")), {}, errors.DeviceError, "one device"),
        (([[1.0]],), {}, errors.InputError, "must be a tensor, got list"),
        ((torch.ones(3, 2),), {"metric": "euclid"}, errors.InputError, "metric must be one of"),
        ((torch.ones(3, 2),), {"backend": "triton"}, errors.BackendError, "Triton"),
    ],
)
def test_errors_before_any_work(
    arguments: tuple, options: dict, raised: type[Exception], says: str, small_blocks: int
) -> None:
    with pytest.raises(raised, match=says):
        pairwise_distance(*arguments, **options)


def test_a_wrong_similarity_is_called_so() -> None:
    with pytest.raises(errors.InputError, match="similarity must be one of"):
        pairwise_similarity(torch.ones(2, 2), similarity="cos")


def test_small_matrices_take_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tileloss.reference, "pairwise_matrix", lambda *_: "the definition")
    assert pairwise_distance(torch.ones(16, 4)) == "the definition"
    assert isinstance(pairwise_distance(torch.ones(300, 4)), Tensor)
    assert isinstance(pairwise_distance(torch.ones(16, 4), metric="manhattan"), Tensor)


@pytest.mark.parametrize("metric", ["euclidean", "squared_euclidean"])
def test_an_infinite_row_is_near_nothing(metric: str, backend: str) -> None:
    rows = torch.ones(9, 2)
    rows[4, 0] = float("inf")
    for found in (pairwise_distance(rows, metric=metric), pairwise_distance(rows, torch.ones(9, 2), metric=metric)):
        others = found[4, torch.arange(9) != 4]
        assert not others.isfinite().any()


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric not in ("cosine", "dot")])
def test_an_infinite_row_is_at_no_distance_from_itself(metric: str, backend: str) -> None:
    rows = torch.ones(9, 2)
    rows[4, 0] = float("inf")
    assert not pairwise_distance(rows, metric=metric).diagonal().any()
    assert not pairwise_similarity(rows, similarity=metric).diagonal().any()


def test_a_row_whose_square_overflows_has_no_nan_from_its_distance_to_itself(backend: str) -> None:
    gradients = []
    for dtype in (torch.float32, torch.float64):
        rows = torch.full((5, 2), 1e18, dtype=dtype)
        rows[3, 0], rows[4] = 1.5e19, -1e18
        rows.requires_grad_()
        gradients += torch.autograd.grad(pairwise_distance(rows).sum(), rows)
    torch.testing.assert_close(gradients[0][3].double(), gradients[1][3])


def test_norms_whose_sum_overflows_may_be_at_a_finite_distance(backend: str) -> None:
    rows = torch.tensor([[1.1e19], [1.5e19]])
    assert not rows.square().sum().isfinite()
    for found in (pairwise_distance(rows), pairwise_distance(rows, rows.clone())):
        torch.testing.assert_close(found, torch.tensor([[0.0, 4e18], [4e18, 0.0]]))
