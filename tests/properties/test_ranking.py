"""The ranking loss: whatever is given, the definition's answer or a refusal."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tileloss.functional import ranking_loss

from .judge import Call, assert_definition, assert_refused_alike
from .strategies import DTYPES, SIZES, classes, matrices, spoiled


@st.composite
def calls(draw: st.DrawFn, extreme: bool = False) -> Call:
    size = draw(SIZES)
    scores = draw(matrices(size, 2, draw(DTYPES)[0], extreme))[:, 1] * draw(st.sampled_from([1.0, 20.0]))
    # beyond, the definition's own gradient is wrong: the logarithm of a count is lost beside such a score
    scores = torch.where(scores.isfinite(), scores.clamp(-1e4, 1e4), scores)
    labels = draw(classes(size))
    # their differences are as exact as the scores
    largest = scores.double().nan_to_num(0.0, 0.0, 0.0).abs().amax().item() if size else 0.0
    return Call(lambda scores: ranking_loss(scores, labels), [scores], {"labels": labels}, slope=1.0 + largest)


@given(calls())
def test_the_definition(call: Call) -> None:
    assert_definition(call)


@given(calls(extreme=True))
def test_extremes(call: Call) -> None:
    assert_definition(call)


@given(spoiled({"scores": torch.ones(3), "labels": torch.arange(3)}))
def test_refusals(arguments: dict[str, Any]) -> None:
    assert_refused_alike(ranking_loss, arguments)
