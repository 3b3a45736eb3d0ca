"""The definition against the sums written out in Python floats."""

import math

import pytest
import torch

from tileloss.reference.dispersion import dispersion


def cosine(a: list[float], b: list[float]) -> float:
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return product / (max(math.hypot(*a), 1e-12) * max(math.hypot(*b), 1e-12))


@pytest.mark.parametrize("size", [2, 3, 9])
def test_pair_by_pair(size: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(size, 3, dtype=torch.float64)
    rows[0] = 0.0
    pairs = [cosine(a, b) for i, a in enumerate(rows.tolist()) for j, b in enumerate(rows.tolist()) if i != j]
    mean, second_moment = dispersion(rows, "cosine")
    assert mean.item() == pytest.approx(math.fsum(pairs) / len(pairs), abs=1e-15)
    assert second_moment.item() == pytest.approx(math.fsum(x * x for x in pairs) / len(pairs), abs=1e-15)


def test_rows_at_right_angles() -> None:
    mean, second_moment = dispersion(3 * torch.eye(4), "cosine")
    assert mean.item() == 0.0
    assert second_moment.item() == 0.0
    assert [x.item() for x in dispersion(torch.ones(4, 2), "dot")] == [2.0, 4.0]


@pytest.mark.parametrize("size", [0, 1])
def test_without_two_rows_there_is_nothing_to_compare(size: int) -> None:
    rows = torch.ones(size, 2, requires_grad=True)
    mean, second_moment = dispersion(rows, "cosine")
    assert mean.item() == 0.0
    assert second_moment.item() == 0.0
    (mean + second_moment).backward()
    assert rows.grad is not None
    assert not rows.grad.any()
