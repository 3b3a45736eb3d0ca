"""Matrices of distances and similarities: whatever is given, the definition's answer or a refusal."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tileloss.functional import pairwise_distance, pairwise_similarity
from tileloss.metrics import METRICS

from .judge import Call, assert_definition, assert_refused_alike
from .strategies import DTYPES, SIZES, WIDTHS, matrices, spoiled


@st.composite
def calls(draw: st.DrawFn, extreme: bool = False) -> Call:
    """Rows against others, or against themselves."""
    width, dtypes, count = draw(WIDTHS), draw(DTYPES), draw(st.sampled_from([1, 2]))
    inputs = [draw(matrices(draw(SIZES), width, dtype, extreme)) for dtype in dtypes[:count]]
    metric, similarity = draw(st.sampled_from(METRICS)), draw(st.booleans())
    slope, widths = 4.0 * max(len(x) for x in inputs), (width,) if metric == "cosine" else ()

    def run(*rows: torch.Tensor) -> torch.Tensor:
        if similarity:
            return pairwise_similarity(*rows, similarity=metric)
        return pairwise_distance(*rows, metric=metric)

    return Call(run, inputs, {"metric": metric, "similarity": similarity}, slope, widths)


@given(calls())
def test_the_definition(call: Call) -> None:
    assert_definition(call)


@given(calls(extreme=True))
def test_extremes(call: Call) -> None:
    assert_definition(call)


@given(spoiled({"a": torch.ones(3, 3), "b": torch.ones(3, 3), "metric": "euclidean"}))
def test_refusals_of_distances(arguments: dict[str, Any]) -> None:
    assert_refused_alike(pairwise_distance, arguments)


@given(spoiled({"a": torch.ones(3, 3), "b": None, "similarity": "cosine"}))
def test_refusals_of_similarities(arguments: dict[str, Any]) -> None:
    assert_refused_alike(pairwise_similarity, arguments)
