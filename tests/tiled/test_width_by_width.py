"""The widths one after the other add up to what they are together."""

import pytest
import torch

from tileloss.spec import ContrastiveSpec
from tileloss.tiled import Needs, Problem
from tileloss.tiled.matryoshka import matryoshka_contrastive_loss
from tileloss.tiled.width_by_width import width_by_width


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, True), (False,) * 3])
@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", "doc_to_query")])
def test_the_same_sums(needs: tuple[bool, bool, bool], directions: tuple[str, ...], small_blocks: int) -> None:
    torch.manual_seed(0)
    queries, docs = torch.randn(33, 20, dtype=torch.float64), torch.randn(66, 20, dtype=torch.float64)
    problem = Problem(33, 66, 5.0, ContrastiveSpec("cosine", directions))
    arguments = queries, docs, problem, [3, 7, 16], [1.0, 0.5, -2.0], Needs(*needs)
    for found, expected in zip(width_by_width(*arguments), matryoshka_contrastive_loss(*arguments), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_narrow_rows_get_narrow_gradients(small_blocks: int) -> None:
    queries, docs = torch.randn(2, 33, 20).to(torch.bfloat16)
    problem = Problem(33, 33, 5.0, ContrastiveSpec("cosine"))
    result = width_by_width(queries, docs, problem, [7, 20], [1.0, 1.0], Needs(True, True, False))
    assert result.loss.dtype == torch.float32
    assert result.d_queries is not None
    assert result.d_queries.dtype == torch.bfloat16
