"""The definition against the sum written out in Python floats."""

import math

import pytest
import torch

from tileloss.reference.ranking import ranking_loss


@pytest.mark.parametrize("size", [0, 1, 2, 9])
def test_term_by_term(size: int) -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(size, dtype=torch.float64), torch.randint(3, (size,))
    pairs = [
        math.exp(lower - higher)
        for lower, below in zip(scores.tolist(), labels.tolist(), strict=True)
        for higher, above in zip(scores.tolist(), labels.tolist(), strict=True)
        if below < above
    ]
    assert ranking_loss(scores, labels).item() == pytest.approx(math.log1p(math.fsum(pairs)), rel=1e-14)


def test_two_rows() -> None:
    scores, labels = torch.tensor([2.0, -1.0], requires_grad=True), torch.tensor([5, 3])
    loss = ranking_loss(scores, labels)
    loss.backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-3)))
    assert scores.grad is not None
    share = math.exp(-3) / (1 + math.exp(-3))
    assert scores.grad.tolist() == pytest.approx([-share, share])


def test_equal_labels_are_not_compared() -> None:
    scores = torch.randn(4, requires_grad=True)
    loss = ranking_loss(scores, torch.zeros(4))
    loss.backward()
    assert loss.item() == 0.0
    assert scores.grad is not None
    assert not scores.grad.any()


def test_narrow_scores_are_raised() -> None:
    scores = torch.randn(9).bfloat16()
    assert torch.equal(ranking_loss(scores, torch.arange(9)), ranking_loss(scores.float(), torch.arange(9)))
