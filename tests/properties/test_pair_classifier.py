"""The classifier over pairs: whatever is given, the definition's answer or a refusal."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tileloss.functional import pair_logits

from .judge import SUBJECT, Call, assert_definition, assert_refused_alike
from .strategies import NARROW, SIZES, WIDE, WIDTHS, matrices, spoiled

pytestmark = pytest.mark.skipif(SUBJECT == "triton", reason="has no kernels")

FEATURES = ["rep", "difference", "multiplication"]


@st.composite
def calls(draw: st.DrawFn, extreme: bool = False) -> Call:
    size, width, labels = draw(SIZES), draw(WIDTHS), draw(st.sampled_from([1, 2, 3, 40]))
    concatenate = draw(st.lists(st.sampled_from(FEATURES), min_size=1, unique=True))
    vectors = len(concatenate) + ("rep" in concatenate)
    dtype = draw(st.sampled_from(WIDE + NARROW))
    # the features are computed in the weight's dtype, to which float64 that differs from float32 by less is equal
    dtypes = st.sampled_from([x for x in WIDE + NARROW if x.itemsize <= max(dtype.itemsize, 4)])
    inputs = [draw(matrices(size, width, draw(dtypes), extreme)) for _ in range(2)]
    inputs.append(draw(matrices(labels, vectors * width, dtype)))
    if draw(st.booleans()):
        inputs.append(torch.linspace(-1, 1, labels).to(dtype))
    return Call(
        lambda *rows: pair_logits(*rows, concatenate=concatenate), inputs, {"concatenate": concatenate}, slope=4.0
    )


@given(calls())
def test_the_definition(call: Call) -> None:
    assert_definition(call)


@given(calls(extreme=True))
def test_extremes(call: Call) -> None:
    assert_definition(call)


ARGUMENTS = {
    "first": torch.ones(3, 3), "second": torch.ones(3, 3), "weight": torch.ones(2, 9), "bias": torch.ones(2),
    "concatenate": ("rep", "difference"),
}  # fmt: skip


@given(spoiled(ARGUMENTS))
def test_refusals(arguments: dict[str, Any]) -> None:
    assert_refused_alike(pair_logits, arguments)
