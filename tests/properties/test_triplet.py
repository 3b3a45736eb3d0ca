"""Mined triplets and their masks: whatever is given, the definition's answer or a refusal."""

from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tileloss.functional import triplet_loss, triplet_loss_with_stats, triplet_masks
from tileloss.functional.triplet import DISTANCES, MINING

from .judge import Call, assert_definition, assert_refused_alike
from .strategies import DTYPES, SIZES, WIDTHS, classes, matrices, spoiled


@st.composite
def calls(draw: st.DrawFn, extreme: bool = False) -> Call:
    size = draw(SIZES.filter(bool))
    embeddings = draw(matrices(size, draw(WIDTHS), draw(DTYPES)[0], extreme))
    labels = draw(classes(size))
    settings = {
        "mining": draw(st.sampled_from(MINING)),
        "distance": draw(st.sampled_from(DISTANCES)),
        "margin": draw(st.sampled_from([5.0, 0.3, 0.0, -1.0, "soft"])),
    }
    # where there is no negative, the definition follows the first of numbers that were equal before one was added;
    # and a row at a distance that is no number is taken for far or for near, as the order of comparisons has it
    if extreme and settings["mining"] != "all":
        assume(len(labels.unique()) > 1 and embeddings.isfinite().all())
    widths = embeddings.shape[1:] if settings["distance"] == "cosine" else ()
    function = draw(st.sampled_from([triplet_loss, triplet_loss_with_stats]))
    if settings["margin"] == 0.0 or not embeddings.isfinite().all():
        function = triplet_loss  # which of terms that are equal, or nan, count is a matter of rounding
    return Call(
        lambda x: function(x, labels, **settings), [embeddings], settings | {"labels": labels.tolist()}, 4.0, widths
    )


@given(calls())
def test_the_definition(call: Call) -> None:
    assert_definition(call)


@given(calls(extreme=True))
def test_extremes(call: Call) -> None:
    assert_definition(call)


ARGUMENTS = {
    "embeddings": torch.ones(3, 3), "labels": torch.arange(3), "mining": "all", "margin": 5.0, "distance": "euclidean",
}  # fmt: skip


@given(st.sampled_from([triplet_loss, triplet_loss_with_stats]), spoiled(ARGUMENTS))
def test_refusals(function: Any, arguments: dict[str, Any]) -> None:
    assert_refused_alike(function, arguments)


@given(st.data(), st.booleans())
def test_the_definition_of_masks(data: st.DataObject, triplets: bool) -> None:
    labels = data.draw(classes(data.draw(SIZES)))
    if labels.is_floating_point() and len(labels):
        labels[data.draw(st.integers(0, len(labels) - 1))] = data.draw(st.sampled_from([float("nan"), float("inf")]))
    # the labels are no input: no number has a gradient here
    assert_definition(Call(lambda: triplet_masks(labels, triplets=triplets), [], {"labels": labels}, slope=0.0))


@given(spoiled({"labels": torch.arange(3)}))
def test_refusals_of_masks(arguments: dict[str, Any]) -> None:
    assert_refused_alike(triplet_masks, arguments)
