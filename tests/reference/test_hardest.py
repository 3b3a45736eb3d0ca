"""The definition against the maximum written out in Python floats."""

import math

import pytest
import torch

from tileloss.reference.hardest import hardest_negatives


def cosine(a: list[float], b: list[float]) -> float:
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return product / (max(math.hypot(*a), 1e-12) * max(math.hypot(*b), 1e-12))


@pytest.mark.parametrize(("size", "count"), [(2, 2), (9, 9), (5, 13)])
def test_entry_by_entry(size: int, count: int) -> None:
    torch.manual_seed(0)
    queries, docs = torch.randn(size, 3, dtype=torch.float64), torch.randn(count, 3, dtype=torch.float64)
    hardest, index, own = hardest_negatives(queries, docs, "cosine")
    for row, query in enumerate(queries.tolist()):
        similarities = [cosine(query, doc) for doc in docs.tolist()]
        assert own[row].item() == pytest.approx(similarities[row], abs=1e-12)
        similarities[row] = -math.inf
        assert hardest[row].item() == pytest.approx(max(similarities), abs=1e-12)
        assert index[row].item() == similarities.index(max(similarities))


def test_the_first_of_equals() -> None:
    docs = torch.ones(4, 2)
    assert hardest_negatives(docs, docs, "dot")[1].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(("size", "count"), [(0, 0), (0, 3), (1, 1)])
def test_where_there_is_nothing_to_choose_from(size: int, count: int) -> None:
    queries, docs = torch.ones(size, 2, requires_grad=True), torch.ones(count, 2, requires_grad=True)
    hardest, index, own = hardest_negatives(queries, docs, "dot")
    assert hardest.tolist() == [-math.inf] * size
    assert index.tolist() == [-1] * size
    assert own.tolist() == [2.0] * size
    (hardest.relu() + own).sum().backward()
    assert queries.grad is not None
    assert queries.grad.tolist() == [[1.0, 1.0]] * size
