"""Dispersion: whatever is given, the definition's answer or a refusal."""

from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tileloss.functional import dispersion
from tileloss.similarity import up

from .judge import Call, assert_definition, assert_refused_alike
from .strategies import DTYPES, SIZES, WIDTHS, matrices, spoiled


@st.composite
def calls(draw: st.DrawFn, extreme: bool = False) -> Call:
    similarity = draw(st.sampled_from(["cosine", "torch_cosine", "dot"]))
    embeddings = draw(matrices(draw(SIZES), draw(WIDTHS), draw(DTYPES)[0], extreme))
    slope, widths = 4.0, embeddings.shape[1:]
    if similarity == "dot" and embeddings.numel():
        # the squares of the squared norms are subtracted, by which digits are lost, and from which overflow all
        norms = torch.linalg.vector_norm(up(embeddings), dim=1)
        assume((norms**4).sum() < float("inf") or not norms.isfinite().all())
        slope, widths = 4.0 * (1.0 + norms.double().amax().item() ** 4), embeddings.shape[:0]

    def run(embeddings: torch.Tensor) -> Any:
        return dispersion(embeddings, similarity=similarity)

    return Call(run, [embeddings], {"similarity": similarity}, slope, widths)


@given(calls())
def test_the_definition(call: Call) -> None:
    assert_definition(call)


@given(calls(extreme=True))
def test_extremes(call: Call) -> None:
    assert_definition(call)


@given(spoiled({"embeddings": torch.ones(3, 3), "similarity": "cosine"}))
def test_refusals(arguments: dict[str, Any]) -> None:
    assert_refused_alike(dispersion, arguments)
