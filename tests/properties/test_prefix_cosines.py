"""Cosines at prefix widths: whatever is given, the definition's answer or a refusal."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tileloss.functional import prefix_cosines

from .judge import Call, assert_definition, assert_refused_alike
from .strategies import DTYPES, SIZES, WIDTHS, matrices, spoiled


@st.composite
def calls(draw: st.DrawFn, extreme: bool = False) -> Call:
    size, width = draw(SIZES), draw(WIDTHS.filter(bool))
    inputs = [draw(matrices(size, width, dtype, extreme)) for dtype in draw(DTYPES)]
    dims = draw(st.lists(st.integers(1, width), min_size=1, max_size=4))
    return Call(lambda a, b: prefix_cosines(a, b, dims), inputs, {"dims": dims}, slope=4.0, directions=tuple(dims))


@given(calls())
def test_the_definition(call: Call) -> None:
    assert_definition(call)


@given(calls(extreme=True))
def test_extremes(call: Call) -> None:
    assert_definition(call)


@given(spoiled({"a": torch.ones(3, 3), "b": torch.ones(3, 3), "dims": [1, 3]}))
def test_refusals(arguments: dict[str, Any]) -> None:
    assert_refused_alike(prefix_cosines, arguments)
