"""Paired similarities and distances: whatever is given, the definition's answer or a refusal."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tileloss.functional import paired_distance, paired_similarity

from .judge import Call, assert_definition, assert_refused_alike
from .strategies import NARROW, SIZES, WIDE, WIDTHS, matrices, spoiled

SIMILARITIES = ["cosine", "torch_cosine", "dot", "angle", "euclidean", "manhattan"]
METRICS = ["euclidean", "squared_euclidean", "manhattan", "cosine", "torch_cosine"]


@st.composite
def calls(draw: st.DrawFn, extreme: bool = False) -> Call:
    """`a` against a matrix or several, of any mixture of dtypes, some of one row."""
    size, width, count = draw(SIZES), draw(WIDTHS), draw(st.sampled_from([None, 1, 2, 3]))
    rows, dtypes = st.sampled_from([size, size, size, 1]), st.sampled_from(WIDE + NARROW)
    inputs = [draw(matrices(draw(rows), width, draw(dtypes), extreme)) for _ in range(1 + (count or 1))]
    if draw(st.booleans()):
        settings: dict[str, Any] = {"similarity": draw(st.sampled_from(SIMILARITIES))}
        function: Any = paired_similarity
    else:
        settings = {"metric": draw(st.sampled_from(METRICS)), "eps": draw(st.sampled_from([0.0, 1e-6, 0.5]))}
        function = paired_distance

    def run(a: torch.Tensor, *others: torch.Tensor) -> Any:
        return function(a, others[0] if count is None else others, **settings)

    name = next(iter(settings.values()))
    widths = (width,) if name == "angle" or "cosine" in name else ()
    return Call(run, inputs, settings, slope=4.0, directions=widths)


@given(calls())
def test_the_definition(call: Call) -> None:
    assert_definition(call)


@given(calls(extreme=True))
def test_extremes(call: Call) -> None:
    assert_definition(call)


@given(spoiled({"a": torch.ones(3, 3), "b": torch.ones(3, 3), "similarity": "cosine"}))
def test_refusals_of_similarities(arguments: dict[str, Any]) -> None:
    assert_refused_alike(paired_similarity, arguments)


@given(spoiled({"a": torch.ones(3, 3), "b": torch.ones(3, 3), "metric": "euclidean", "eps": 0.0}))
def test_refusals_of_distances(arguments: dict[str, Any]) -> None:
    assert_refused_alike(paired_distance, arguments)
