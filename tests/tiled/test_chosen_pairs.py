"""Gradients that reach chosen pairs alone equal a product with the whole matrix of slopes."""

import pytest
import torch
from torch import Tensor

from tileloss.tiled import chosen_pairs
from tileloss.tiled.chosen_pairs import pull_pairs
from tileloss.tiled.distance import SquaredEuclideanDistance
from tileloss.tiled.rows import Rows


@pytest.fixture(params=[False, True], ids=["whole", "in steps"])
def _steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(chosen_pairs, "_ROWS_AT_ONCE", 7)


def pairs(rows: int, columns: int, per_row: int) -> tuple[Tensor, Tensor]:
    """Weights, a third of them zero, and partners, half of them one and the same row."""
    torch.manual_seed(0)
    weights = torch.randn(rows, per_row, dtype=torch.float64)
    weights[torch.rand(rows, per_row) < 0.3] = 0.0
    partners = torch.randint(columns, (rows, per_row))
    partners[torch.rand(rows, per_row) < 0.5] = columns // 2
    return weights, partners


def dense(weights: Tensor, partners: Tensor, columns: int) -> Tensor:
    """The matrix of slopes (B, C)."""
    slopes = torch.zeros(len(weights), columns, dtype=weights.dtype)
    for column in range(weights.shape[1]):
        slopes[torch.arange(len(weights)), partners[:, column]] += weights[:, column]
    return slopes


@pytest.mark.usefixtures("_steps")
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("b", "c", "d", "k"), [(1, 1, 3, 1), (63, 100, 65, 2), (100, 5, 1, 3), (2, 257, 7, 1)])
def test_as_the_whole_matrix_of_slopes(b: int, c: int, d: int, k: int, dtype: torch.dtype, norms: bool) -> None:
    weights, partners = pairs(b, c, k)
    left, right = torch.randn(b, d, dtype=torch.float64), torch.randn(c, d, dtype=torch.float64)
    expected = torch.randn(b, d, dtype=torch.float64), torch.randn(c, d, dtype=torch.float64)
    found = [x.to(dtype, copy=True) for x in expected]
    distance = SquaredEuclideanDistance(Rows(left))
    pull = distance.pull if norms else lambda *sides: distance.product.pull(sides[0], *sides[1:3], None, *sides[3:])
    pull(dense(weights, partners, c), left, right, *expected)
    pull_pairs(weights.to(dtype), partners, left.to(dtype), right.to(dtype), *found, norms=norms)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= (1e-12 if dtype == torch.float64 else 1e-6) * theirs.norm()


@pytest.mark.usefixtures("_steps")
@pytest.mark.parametrize("norms", [False, True])
def test_both_sides_may_be_the_same(norms: bool) -> None:
    weights, partners = pairs(63, 63, 2)
    x = torch.randn(63, 65, dtype=torch.float64)
    apart, together = (torch.zeros_like(x), torch.zeros_like(x)), torch.zeros_like(x)
    pull_pairs(weights, partners, x, x, *apart, norms=norms)
    pull_pairs(weights, partners, x, x, together, together, norms=norms)
    torch.testing.assert_close(together, apart[0] + apart[1], rtol=1e-12, atol=1e-12)


def test_a_side_without_a_gradient_changes_nothing_on_the_other() -> None:
    weights, partners = pairs(63, 20, 2)
    left, right = torch.randn(63, 5), torch.randn(20, 5)
    both, alone = [[torch.zeros(63, 5), torch.zeros(20, 5)] for _ in range(2)]
    pull_pairs(weights.float(), partners, left, right, *both)
    pull_pairs(weights.float(), partners, left, right, alone[0], None)
    pull_pairs(weights.float(), partners, left, right, None, alone[1])
    assert torch.equal(both[0], alone[0])
    assert torch.equal(both[1], alone[1])


def test_narrow_rows_are_summed_in_float32() -> None:
    weights, partners = pairs(300, 3, 1)
    left, right = torch.randn(300, 65).bfloat16(), torch.randn(3, 65).bfloat16()
    found, expected = [[torch.zeros(300, 65), torch.zeros(3, 65)] for _ in range(2)]
    pull_pairs(weights.float(), partners, left, right, *found)
    pull_pairs(weights.float(), partners, left.float(), right.float(), *expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("_steps")
def test_two_runs_and_any_number_of_threads_agree_bit_by_bit() -> None:
    weights, partners = (x.to(t) for x, t in zip(pairs(5000, 40, 2), (torch.float32, torch.int64), strict=True))
    left, right = torch.randn(5000, 33), torch.randn(40, 33)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 4, 4):
        torch.set_num_threads(count)
        results.append([torch.zeros_like(left), torch.zeros_like(right)])
        pull_pairs(weights, partners, left, right, *results[-1], norms=True)
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
