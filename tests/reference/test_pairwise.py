"""The definition of distances and masks against formulas written out entry by entry in Python floats."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from tileloss import reference
from tileloss.metrics import METRICS

Vector = Sequence[float]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


BY_HAND: dict[str, Callable[[Vector, Vector], float]] = {
    "euclidean": lambda a, b: math.dist(a, b),
    "squared_euclidean": lambda a, b: math.dist(a, b) ** 2,
    "cosine": lambda a, b: 1.0 - dot(a, b) / (math.hypot(*a) * math.hypot(*b)),
    "manhattan": lambda a, b: math.fsum(abs(x - y) for x, y in zip(a, b, strict=True)),
    "dot": lambda a, b: -dot(a, b),
}


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_entries(metric: str, within: bool) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    found = reference.pairwise_matrix(a, None if within else b, metric, False)
    for i, x in enumerate(a.tolist()):
        for j, y in enumerate((a if within else b).tolist()):
            zero = within and i == j and metric != "dot"
            assert found[i, j].item() == (0.0 if zero else pytest.approx(BY_HAND[metric](x, y), rel=1e-12, abs=1e-15))
    similarity = reference.pairwise_matrix(a, None if within else b, metric, True)
    if metric == "cosine":
        torch.testing.assert_close(similarity, 1.0 - found)
    else:
        assert torch.equal(similarity, -found)


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_are_those_of_the_values(metric: str) -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(rows, 3, dtype=torch.float64, requires_grad=True) for rows in (5, 4))
    assert torch.autograd.gradcheck(lambda a, b: reference.pairwise_matrix(a, b, metric, False), (a, b))
    assert torch.autograd.gradcheck(lambda a: reference.pairwise_matrix(a, None, metric, True), (a,))


def test_the_gradient_of_the_squares_of_near_rows_is_twice_their_difference() -> None:
    """Near as they are, and zero as their distance counts."""
    a = torch.randn(1, 8, requires_grad=True)
    b = a.detach() * (1 + 1e-4)
    distance = reference.pairwise_matrix(a, b, "squared_euclidean", False)
    assert distance.item() == 0.0
    (gradient,) = torch.autograd.grad(distance.sum(), a)
    torch.testing.assert_close(gradient, 2 * (a - b).detach(), rtol=1e-2, atol=1e-6)


def test_masks_entry_by_entry() -> None:
    labels = [3, 1, 3, 1, 1, 7]
    positive, negative, triplet = reference.triplet_masks(torch.tensor(labels), True)
    assert triplet is not None
    places = range(len(labels))
    for a in places:
        for p in places:
            assert positive[a, p] == (a != p and labels[a] == labels[p])
            assert negative[a, p] == (labels[a] != labels[p])
            for n in places:
                valid = len({a, p, n}) == 3 and labels[a] == labels[p] and labels[a] != labels[n]
                assert triplet[a, p, n] == valid
