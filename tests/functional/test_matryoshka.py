"""All prefix widths in one call are the weighted sum of one call each, on every backend, whatever the objective."""

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tileloss import Guide
from tileloss.errors import DtypeError, InputError, ShapeError
from tileloss.functional import (
    contrastive_loss,
    contrastive_loss_with_stats,
    matryoshka_contrastive_loss,
    matryoshka_contrastive_loss_with_stats,
)
from tileloss.spec import DIRECTIONS

WEIGHTS = {65: 1.0, 7: 0.5, 40: 2.0, 16: -0.25}
CLIP = ("query_to_doc", "doc_to_query")
OWN_SIDES = ("query_to_doc", "query_to_query", "doc_to_doc")


def ids(size: int, count: int) -> Tensor:
    return torch.randint(0, size // 2 + 1, (count,), generator=torch.Generator().manual_seed(1))


def mask(size: int, count: int) -> Tensor:
    return torch.rand(size, count, generator=torch.Generator().manual_seed(2)) < 0.3


def guide(size: int, count: int) -> Guide:
    rows = torch.randn(size + count, 7, generator=torch.Generator().manual_seed(3))
    return Guide(*rows.split([size, count]), margin=0.2)


# columns of documents, what is excluded, and the rest of an objective
OBJECTIVES: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "query to doc": (1, None, {}),
    "hard negatives, ids": (3, ids, {}),
    "own sides": (2, None, {"directions": OWN_SIDES}),
    "own sides, guide": (2, guide, {"directions": OWN_SIDES}),
    "guide, hardness": (1, guide, {"hardness": ("in_batch_negatives", 2.0)}),
    "clip": (1, None, {"directions": CLIP, "partition": "per_direction"}),
    "clip, mask, hard negatives": (2, mask, {"directions": CLIP}),
    "clip, hardness": (2, None, {"directions": CLIP, "hardness": ("hard_negatives", 2.0)}),
    "four directions": (1, None, {"directions": DIRECTIONS}),
    "four directions, ids, hardness": (2, ids, {"directions": DIRECTIONS, "hardness": ("all_negatives", 2.0)}),
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a block that even a test's block has many of."""
    monkeypatch.setattr(importlib.import_module("tileloss.tiled.matryoshka"), "_PART_BYTES", 5000)


def batch(size: int, count: int, width: int = 65, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, docs near their queries, and a scale."""
    torch.manual_seed(0)
    queries, docs = torch.randn(size, width, dtype=torch.float64), torch.randn(count, width, dtype=torch.float64)
    docs[:size] += queries
    return [queries.to(dtype), docs.to(dtype), torch.tensor(5.0, dtype=torch.promote_types(dtype, torch.float32))]


def with_gradients(loss_of: Any, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = loss_of(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def at_once(dims: Any = None, **options: Any) -> Any:
    dims = WEIGHTS if dims is None else dims
    return lambda q, d, s: matryoshka_contrastive_loss(q, d, dims=dims, scale=s, **options)


def one_by_one(weights: dict[int, float] = WEIGHTS, **options: Any) -> Any:
    return lambda q, d, s: sum(
        weight * contrastive_loss(q[:, :dim], d[:, :dim], scale=s, backend="reference", **options)
        for dim, weight in weights.items()
    )


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance / 100)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("size", [33, 63])
def test_it_is_the_sum_over_widths(name: str, size: int, backend: str) -> None:
    columns, excluded, options = OBJECTIVES[name]
    count = columns * size
    options = options | ({"exclude": excluded(size, count)} if excluded else {})
    inputs = batch(size, count)
    assert_equal(with_gradients(at_once(**options), inputs), with_gradients(one_by_one(**options), inputs))


@pytest.mark.parametrize(("size", "count", "width"), [(1, 1, 3), (2, 5, 1), (2, 2, 65), (100, 163, 3), (257, 257, 65)])
@pytest.mark.parametrize("directions", [("query_to_doc",), CLIP])
def test_every_shape(size: int, count: int, width: int, directions: tuple[str, ...], backend: str) -> None:
    weights = {dim: 1.0 / dim for dim in {1, (width + 1) // 2, width}}
    inputs = batch(size, count, width)
    found = with_gradients(at_once(weights, directions=directions), inputs)
    assert_equal(found, with_gradients(one_by_one(weights, directions=directions), inputs))


def test_as_sentence_transformers_computes_it(backend: str) -> None:
    """Prefixes are normalised, and compared by the cosine once more."""
    util = pytest.importorskip("sentence_transformers.util")
    inputs = batch(20, 40)

    def oracle(q: Tensor, d: Tensor, scale: Tensor) -> Tensor:
        loss = torch.zeros((), dtype=q.dtype)
        for dim, weight in WEIGHTS.items():
            a, b = F.normalize(q[:, :dim], dim=-1), F.normalize(d[:, :dim], dim=-1)
            loss = loss + weight * F.cross_entropy(util.cos_sim(a, b) * scale, torch.arange(len(q)))
        return loss

    assert_equal(with_gradients(at_once(), inputs), with_gradients(oracle, inputs), 1e-8)


def test_one_full_width_is_the_plain_loss(backend: str) -> None:
    inputs = batch(33, 66)
    plain = with_gradients(lambda q, d, s: contrastive_loss(q, d, scale=s), inputs)
    assert_equal(with_gradients(at_once([65]), inputs), plain)


def test_order_and_repeats_of_widths(backend: str) -> None:
    inputs = batch(20, 20)
    expected = with_gradients(at_once({7: 2.0, 65: 1.0}), inputs)
    for dims in ([7, 65, 7], (65, 7, 7), {65: 1, 7: 2}):
        assert_equal(with_gradients(at_once(dims), inputs), expected)


def test_numbers_beyond_the_longest_prefix_get_no_gradient(backend: str) -> None:
    _, d_queries, d_docs, _ = with_gradients(at_once([40, 7]), batch(20, 20))
    assert not d_queries[:, 40:].any()
    assert not d_docs[:, 40:].any()
    assert d_queries[:, :40].all()


def test_statistics_of_every_width(backend: str) -> None:
    queries, docs, _ = batch(33, 66)
    _, found = matryoshka_contrastive_loss_with_stats(queries, docs, dims=WEIGHTS)
    assert set(found) == set(WEIGHTS)
    for dim, stats in found.items():
        torch.testing.assert_close(stats, contrastive_loss_with_stats(queries[:, :dim], docs[:, :dim])[1])
        assert stats.accuracy.dtype == torch.float32


@pytest.mark.parametrize("directions", [("query_to_doc",), CLIP])
def test_permuting_the_batch_permutes_the_gradients(directions: tuple[str, ...], backend: str) -> None:
    queries, docs, scale = batch(33, 33)
    order = torch.randperm(33)
    loss, d_queries, d_docs, d_scale = with_gradients(at_once(directions=directions), [queries, docs, scale])
    permuted = with_gradients(at_once(directions=directions), [queries[order], docs[order], scale])
    assert_equal(permuted, [loss, d_queries[order], d_docs[order], d_scale])


def test_any_strides(backend: str) -> None:
    queries, docs, scale = batch(33, 33)
    expected = with_gradients(at_once(), [queries, docs, scale])
    wide = torch.randn(33, 130, dtype=torch.float64)
    wide[:, ::2] = queries
    loss = matryoshka_contrastive_loss(wide[:, ::2], docs.T.contiguous().T, dims=WEIGHTS, scale=scale)
    torch.testing.assert_close(loss, expected[0])
    one = queries[:1].clone().requires_grad_()
    expanded = matryoshka_contrastive_loss(one.expand(33, -1), docs, dims=WEIGHTS, scale=scale)
    whole = queries[:1].expand(33, -1).clone().requires_grad_()
    copied = matryoshka_contrastive_loss(whole, docs, dims=WEIGHTS, scale=scale)
    found, rows = torch.autograd.grad(expanded, one)[0], torch.autograd.grad(copied, whole)[0]
    torch.testing.assert_close(found, rows.sum(0, keepdim=True))


@pytest.mark.parametrize("directions", [("query_to_doc",), CLIP])
def test_prefixes_of_nothing_but_zeros(directions: tuple[str, ...], backend: str) -> None:
    """A row may begin with zeros: the norm of that prefix is clamped, and a constant."""
    queries, docs, scale = batch(20, 20)
    queries[3, :7] = 0.0
    docs[5, :16] = 0.0
    docs[6, :7] = 1e-14
    found = with_gradients(at_once(directions=directions), [queries, docs, scale])
    assert_equal(found, with_gradients(one_by_one(directions=directions), [queries, docs, scale]))
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("directions", [("query_to_doc",), OWN_SIDES, CLIP])
def test_only_what_is_wanted(wanted: tuple[bool, bool], directions: tuple[str, ...], backend: str) -> None:
    queries, docs, scale = batch(33, 66)
    expected = with_gradients(at_once(directions=directions), [queries, docs, scale])
    leaves = [x.clone().requires_grad_(need) for x, need in zip((queries, docs), wanted, strict=True)]
    scale.requires_grad_(not any(wanted))
    loss = at_once(directions=directions)(*leaves, scale)
    loss.backward()
    assert_equal([loss.detach()], expected[:1])
    for leaf, gradient in zip((*leaves, scale), expected[1:], strict=True):
        assert (leaf.grad is None) == (not leaf.requires_grad)
        if leaf.grad is not None:
            assert_equal([leaf.grad], [gradient])
    with torch.no_grad():
        assert_equal([at_once(directions=directions)(*leaves, scale)], expected[:1])


@pytest.mark.parametrize("size", [0])
def test_an_empty_batch_is_nan(size: int, backend: str) -> None:
    queries, docs, _ = batch(size, size)
    assert matryoshka_contrastive_loss(queries, docs, dims=[7]).isnan()


@pytest.mark.parametrize(
    ("dims", "error", "message"),
    [
        ([], InputError, "at least one prefix width"),
        ({}, InputError, "at least one prefix width"),
        ([0, 7], InputError, "must be > 0"),
        ([-1], InputError, "must be > 0"),
        ([66], ShapeError, "cannot exceed the width of the embeddings, 65"),
        ([7.5], InputError, "must hold integers"),
        ("7", InputError, "sequence of prefix widths"),
        (7, InputError, "sequence of prefix widths"),
        ({7: float("nan")}, InputError, "finite"),
        ({7: float("inf")}, InputError, "finite"),
        ({7: "1"}, InputError, "finite numbers, got '1'"),
    ],
)
def test_bad_widths(dims: Any, error: type[Exception], message: str) -> None:
    queries, docs, _ = batch(4, 4)
    with pytest.raises(error, match=message):
        matryoshka_contrastive_loss(queries, docs, dims=dims)


def test_bad_objectives_are_refused_as_by_the_plain_loss() -> None:
    queries, docs, _ = batch(4, 4)
    with pytest.raises(InputError, match="Scale must be a positive value"):
        matryoshka_contrastive_loss(queries, docs, dims=[7], scale=0.0)
    with pytest.raises(ShapeError):
        matryoshka_contrastive_loss(queries, docs[:3], dims=[7])
    with pytest.raises(DtypeError):
        matryoshka_contrastive_loss(queries, docs.float(), dims=[7])
    with pytest.raises(InputError, match="doc_to_query"):
        matryoshka_contrastive_loss(queries, docs, dims=[7], directions=CLIP, exclude=guide(4, 4))
