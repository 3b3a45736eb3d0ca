"""Blocks of distances and their way back agree with differences taken number by number in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tileloss.tiled.distance import BLOCK_DISTANCES
from tileloss.tiled.rows import Rows

# what the numerics rule grants beside three times the eager error
EXTRA_VALUE, EXTRA_GRADIENT = 1e-5, 1e-4


def definition(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Distances without the difference of squares."""
    if name == "cosine":
        return 1.0 - F.normalize(x) @ F.normalize(y).T
    difference = x[:, None] - y[None]
    return torch.linalg.vector_norm(difference, dim=-1) if name == "euclidean" else difference.square().sum(-1)


@torch.no_grad()
def in_blocks(name: str, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distances, and the gradients of their weighted sum."""
    distance = BLOCK_DISTANCES[name](Rows(x, y))
    left, right = distance.prepare(x), distance.prepare(y)
    block = distance.products(left.rows, right.rows, torch.empty(len(x), len(y), dtype=left.rows.dtype))
    found = distance.distances_(block, left.squares, right.squares)
    slopes = distance.slopes_(weights.clone(), found.clone())
    d_left, d_right = torch.zeros_like(left.rows), torch.zeros_like(right.rows)
    distance.pull(slopes, left.rows, right.rows, d_left, d_right)
    return found, distance.finish(d_left, left, 1.0), distance.finish(d_right, right, 1.0)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", BLOCK_DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 3), (63, 100, 65), (257, 70, 384), (5, 9, 1)])
def test_blocks_agree_with_the_definition(name: str, dtype: torch.dtype, n: int, m: int, d: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    weights = torch.randn(n, m, dtype=torch.promote_types(dtype, torch.float32))
    if name == "cosine" and d == 1:
        pytest.skip("the cosine of numbers is a sign, with no gradient to compare")
    leaves = [v.double().requires_grad_() for v in (x, y)]
    expected = definition(name, *leaves)
    gradients = torch.autograd.grad((expected * weights).sum(), leaves)
    found, *found_gradients = in_blocks(name, x, y, weights)
    assert error(found, expected.detach()) < (1e-12 if dtype == torch.float64 else EXTRA_VALUE)
    for ours, theirs in zip(found_gradients, gradients, strict=True):
        assert error(ours, theirs) < (1e-10 if dtype == torch.float64 else EXTRA_GRADIENT)


@pytest.mark.parametrize("name", ["euclidean", "squared_euclidean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", [3, 384, 4096])
def test_equal_rows_are_at_distance_zero_with_gradient_zero(name: str, dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(100, width, dtype=dtype) + 1.0
    found, d_x, d_y = in_blocks(name, x, x.clone(), torch.eye(100, dtype=dtype))
    assert torch.equal(found.diagonal(), torch.zeros(100, dtype=dtype))
    if name == "euclidean":
        assert not d_x.any()
        assert not d_y.any()


def test_rows_a_little_apart_are_not_taken_for_equal() -> None:
    x = torch.nn.functional.normalize(torch.randn(100, 384))
    near = x + 1e-2 * F.normalize(torch.randn(100, 384))
    found, *_ = in_blocks("euclidean", x, near, torch.eye(100))
    torch.testing.assert_close(found.diagonal(), torch.full((100,), 1e-2), rtol=0.05, atol=0)
