"""Contrastive losses, at one width or several: whatever is given, the definition's answer or a refusal."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tileloss
from tileloss.functional import (
    ContrastiveStats,
    contrastive_loss,
    contrastive_loss_with_stats,
    matryoshka_contrastive_loss,
    matryoshka_contrastive_loss_with_stats,
)
from tileloss.spec import DIRECTIONS, HARDNESS_MODES

from .judge import Call, assert_definition, assert_refused_alike
from .strategies import matrices, queries_and_docs, spoiled

# cosine is what guides and prefix widths are about, and the others scale with the embeddings
SIMILARITIES = ["cosine", "torch_cosine", "dot", "euclidean", "manhattan"]


@st.composite
def objectives(draw: st.DrawFn, size: int, count: int) -> dict[str, Any]:
    """Directions, partition, hardness and exclusions that fit together and the number of rows."""
    columns = size == 0 or count % size == 0
    guided = draw(st.booleans()) and draw(st.booleans())
    allowed = [x for x in DIRECTIONS[1:] if not (x == "doc_to_query" and guided) and (columns or x != "doc_to_doc")]
    directions = draw(st.lists(st.sampled_from(allowed), unique=True))
    chosen: dict[str, Any] = {"directions": (DIRECTIONS[0], *directions)}
    if set(directions) <= {"doc_to_query"}:
        chosen["partition"] = draw(st.sampled_from(["joint", "per_direction"]))
    if columns:
        mode, strength = draw(st.sampled_from(HARDNESS_MODES)), draw(st.sampled_from([0.0, 0.5, 9.0]))
        chosen["hardness"] = (mode, strength)
    chosen["exclude"] = draw(guides(size, count) if guided else exclusions(size, count, columns))
    return chosen


@st.composite
def exclusions(draw: st.DrawFn, size: int, count: int, columns: bool) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    kinds = ["none", "mask", "everything", "ids of all"]
    kind = draw(st.sampled_from([*kinds, "ids of queries"] if columns and size else kinds))
    if kind == "mask":
        return torch.rand(size, count, generator=generator) < 0.3
    if kind == "everything":
        return torch.ones(size, count, dtype=torch.bool)
    if kind == "none":
        return None
    rows = size if kind == "ids of queries" else count
    ids = torch.randint(draw(st.sampled_from([1, 3, 1000])), (rows,), generator=generator)
    return draw(st.sampled_from([ids, -ids, ids + (1 << 62), ids.int()]))


@st.composite
def guides(draw: st.DrawFn, size: int, count: int) -> tileloss.Guide:
    width = draw(st.integers(1, 5))
    queries, docs = (draw(matrices(rows, width, torch.float32)) for rows in (size, count))
    margin = draw(st.sampled_from([0.0, 0.1, -0.3, 2.0]))
    return tileloss.Guide(queries, docs, margin, draw(st.sampled_from(["absolute", "relative"])))


@st.composite
def calls(draw: st.DrawFn, extreme: bool = False) -> Call:
    queries, docs = draw(queries_and_docs(extreme))
    settings = draw(objectives(len(queries), len(docs)))
    settings["similarity"] = draw(st.sampled_from(SIMILARITIES))
    scale = draw(st.sampled_from([1.0, 0.05, 20.0, 1000.0] if extreme else [1.0, 0.05, 20.0]))
    function = draw(st.sampled_from([contrastive_loss, contrastive_loss_with_stats]))
    return _call(draw, function, [queries, docs], scale, settings)


@st.composite
def matryoshka_calls(draw: st.DrawFn, extreme: bool = False) -> Call:
    queries, docs = draw(queries_and_docs(extreme).filter(lambda x: x[0].shape[1] > 0))
    settings = draw(objectives(len(queries), len(docs)))
    dims = draw(st.lists(st.integers(1, queries.shape[1]), min_size=1, max_size=4))
    settings["dims"] = dims if draw(st.booleans()) else {dim: draw(st.sampled_from([0.0, 1.0, -0.5])) for dim in dims}
    function = draw(st.sampled_from([matryoshka_contrastive_loss, matryoshka_contrastive_loss_with_stats]))
    return _call(draw, function, [queries, docs], draw(st.sampled_from([1.0, 20.0])), settings)


def _call(draw: st.DrawFn, function: Any, rows: list[torch.Tensor], scale: float, settings: dict[str, Any]) -> Call:
    learned = draw(st.booleans())
    inputs = [*rows, torch.tensor(scale, dtype=torch.promote_types(rows[0].dtype, torch.float32))] if learned else rows

    def run(queries: torch.Tensor, docs: torch.Tensor, scale: Any = scale) -> Any:
        return _without_accuracy(function(queries, docs, scale=scale, **settings))

    # of the cosines at each of the prefix widths, or of one
    by_direction = "cosine" in settings.get("similarity", "cosine")
    widths = tuple(settings.get("dims", rows[0].shape[1:])) if by_direction else ()
    # a scale's gradient is as large as the similarities, which only cosines are not with the rows
    largest = 1.0
    if not by_direction and rows[1].numel():
        largest += max(torch.linalg.vector_norm(x.double(), dim=1).amax().item() for x in rows if x.numel()) ** 2
    return Call(
        run, inputs, settings | {"function": function.__name__, "scale": scale}, largest * max(scale, 1.0), widths
    )


def _without_accuracy(found: Any) -> Any:
    """Whether a positive beats a negative like it is a matter of rounding."""
    if isinstance(found, ContrastiveStats):
        return found[1:]
    if isinstance(found, tuple):
        return [_without_accuracy(x) for x in found]
    return {dim: _without_accuracy(x) for dim, x in found.items()} if isinstance(found, dict) else found


@given(calls())
def test_the_definition(call: Call) -> None:
    assert_definition(call)


@given(calls(extreme=True))
def test_extremes(call: Call) -> None:
    assert_definition(call)


@given(matryoshka_calls())
def test_the_definition_at_prefix_widths(call: Call) -> None:
    assert_definition(call)


@given(matryoshka_calls(extreme=True))
def test_extremes_at_prefix_widths(call: Call) -> None:
    assert_definition(call)


ARGUMENTS: dict[str, Any] = {
    "queries": torch.ones(3, 3), "docs": torch.ones(3, 3), "scale": 1.0, "directions": ("query_to_doc",),
    "partition": "joint", "hardness": None, "exclude": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (contrastive_loss, ARGUMENTS | {"similarity": "cosine"}),
        (contrastive_loss_with_stats, ARGUMENTS | {"similarity": "cosine"}),
        (matryoshka_contrastive_loss, ARGUMENTS | {"dims": [3, 2]}),
        (matryoshka_contrastive_loss_with_stats, ARGUMENTS | {"dims": [3, 2]}),
    ],
)
@given(st.data())
def test_refusals(function: Any, arguments: dict[str, Any], data: st.DataObject) -> None:
    assert_refused_alike(function, data.draw(spoiled(arguments)))
