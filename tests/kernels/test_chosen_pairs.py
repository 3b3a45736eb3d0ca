"""The way back through chosen pairs, against the product with the whole matrix of slopes in float64."""

import pytest
import torch
from torch import Tensor

from tileloss.kernels.chosen_pairs import pull_pairs


def pairs(rows: int, columns: int, per_row: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights, a third of them zero, and partners, a third of them one and the same row."""
    torch.manual_seed(0)
    weights = torch.randn(rows, per_row)
    weights[torch.rand(rows, per_row) < 0.3] = 0.0
    partners = torch.randint(columns, (rows, per_row))
    partners[torch.rand(rows, per_row) < 0.3] = columns // 2
    return weights.to(device), partners.to(device)


def expected(
    weights: Tensor, partners: Tensor, left: Tensor, right: Tensor, d_left: Tensor, d_right: Tensor, norms: bool
) -> tuple[Tensor, Tensor]:
    slopes = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for weight, partner in zip(weights.double().unbind(1), partners.unbind(1), strict=True):
        slopes[torch.arange(len(left), device=left.device), partner] += weight
    left, right, d_left, d_right = (x.double() for x in (left, right, d_left, d_right))
    d_left, d_right = d_left + slopes @ right, d_right + slopes.T @ left
    if norms:
        d_left, d_right = d_left - slopes.sum(1)[:, None] * left, d_right - slopes.sum(0)[:, None] * right
    return d_left, d_right


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("b", "c", "d", "k"), [(1, 1, 3, 1), (63, 100, 65, 2), (100, 5, 1, 3), (2, 57, 130, 1)])
def test_as_the_whole_matrix_of_slopes(
    b: int, c: int, d: int, k: int, dtype: torch.dtype, norms: bool, device: torch.device, poisoned_empty: None
) -> None:
    weights, partners = pairs(b, c, k, device)
    left, right = torch.randn(b, d, device=device).to(dtype), torch.randn(c, d, device=device).to(dtype)
    found = [torch.randn(b, d, device=device), torch.randn(c, d, device=device)]
    exact = expected(weights, partners, left, right, *found, norms)
    pull_pairs(weights, partners, left, right, *found, norms=norms)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - theirs).norm() <= 1e-6 * theirs.norm()


def test_both_sides_may_be_the_same(device: torch.device) -> None:
    weights, partners = pairs(63, 63, 2, device)
    x = torch.randn(63, 65, device=device)
    together = torch.zeros_like(x)
    exact = sum(expected(weights, partners, x, x, together, together, norms=True))
    pull_pairs(weights, partners, x, x, together, together, norms=True)
    assert (together - exact).norm() <= 1e-6 * exact.norm()


def test_two_runs_agree_bit_by_bit_and_sides_do_not_meet(device: torch.device) -> None:
    weights, partners = pairs(200, 5, 2, device)
    left, right = torch.randn(200, 33, device=device), torch.randn(5, 33, device=device)
    first, second = [[torch.zeros_like(left), torch.zeros_like(right)] for _ in range(2)]
    pull_pairs(weights, partners, left, right, *first, norms=True)
    pull_pairs(weights, partners, left, right, second[0], None, norms=True)
    pull_pairs(weights, partners, left, right, None, second[1], norms=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
