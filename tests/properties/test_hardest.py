"""Hardest negatives: whatever is given, the definition's answer or a refusal."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tileloss.functional import hardest_negatives

from .judge import Call, assert_definition, assert_refused_alike
from .strategies import queries_and_docs, spoiled


@st.composite
def calls(draw: st.DrawFn, extreme: bool = False) -> Call:
    similarity = draw(st.sampled_from(["cosine", "torch_cosine", "dot"]))

    def run(queries: torch.Tensor, docs: torch.Tensor) -> Any:
        return hardest_negatives(queries, docs, similarity=similarity)

    inputs = list(draw(queries_and_docs(extreme)))
    widths = inputs[0].shape[1:] if "cosine" in similarity else ()
    return Call(run, inputs, {"similarity": similarity}, slope=4.0, directions=widths)


@given(calls())
def test_the_definition(call: Call) -> None:
    assert_definition(call)


@given(calls(extreme=True))
def test_extremes(call: Call) -> None:
    assert_definition(call)


@given(spoiled({"queries": torch.ones(3, 3), "docs": torch.ones(3, 3), "similarity": "cosine"}))
def test_refusals(arguments: dict[str, Any]) -> None:
    assert_refused_alike(hardest_negatives, arguments)
