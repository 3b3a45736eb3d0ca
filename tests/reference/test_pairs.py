"""The definition of paired similarities and distances: the oracle's and PyTorch's numbers, near zero too."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tileloss.reference import paired_measure

oracle = pytest.importorskip("sentence_transformers.util")

Measure = Callable[[Tensor, Tensor], Tensor]
SAME: dict[str, Measure] = {
    "cosine": oracle.pairwise_cos_sim,
    "torch_cosine": torch.cosine_similarity,
    "dot": oracle.pairwise_dot_score,
    "euclidean": lambda a, b: -oracle.pairwise_euclidean_sim(a, b),
    "squared_euclidean": lambda a, b: (a - b).square().sum(1),
    "manhattan": lambda a, b: -oracle.pairwise_manhattan_sim(a, b),
}


def value_and_gradients(measure: Measure, a: Tensor, b: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (a, b)]
    found = measure(*leaves)
    return [found.detach(), *torch.autograd.grad(found.sin().sum(), leaves)]


def pairs(width: int) -> tuple[Tensor, Tensor]:
    """Rows among which are zero, tiny and equal ones."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 12, width, dtype=torch.float64)
    a[0], b[1], a[2], b[2], a[3] = 0.0, 0.0, 0.0, 0.0, b[3]
    a[4], b[5], a[6], b[6] = 1e-9 * a[4], 1e-10 * b[5], 1e-14 * a[6], 1e-13 * b[6]
    return a, b


@pytest.mark.parametrize("width", [1, 3, 65])
@pytest.mark.parametrize("measure", SAME)
def test_values_and_gradients(measure: str, width: int) -> None:
    found = value_and_gradients(lambda a, b: paired_measure(a, b, measure, 0.0), *pairs(width))
    for x, y in zip(found, value_and_gradients(SAME[measure], *pairs(width)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 3, 65])
def test_angle_is_the_oracles_with_a_sign(width: int) -> None:
    found = value_and_gradients(lambda a, b: paired_measure(a, b, "angle", 0.0).abs(), *pairs(width))
    for x, y in zip(found, value_and_gradients(oracle.pairwise_angle_sim, *pairs(width)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("measure", "p"), [("euclidean", 2), ("manhattan", 1)])
def test_eps_is_that_of_pairwise_distance(measure: str, p: int) -> None:
    found = value_and_gradients(lambda a, b: paired_measure(a, b, measure, 1e-6), *pairs(5))
    for x, y in zip(found, value_and_gradients(lambda a, b: F.pairwise_distance(a, b, p), *pairs(5)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
