"""The GEMM that keeps log-sum-exps instead of products, against the products themselves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tileloss.kernels import normalisers
from tileloss.kernels.launch import recorded
from tileloss.kernels.logits import Objective
from tileloss.spec import ContrastiveSpec
from tileloss.tiled.passes import Problem
from tileloss.tiled.tile import Tile

# 66 rows put two of them beyond a tile of 64: a last tile with a single pair right of the diagonal
SIZE, DOCS, SCALE = 66, 150, 3.0


def fused(
    direction: str, left: Tensor, right: Tensor, positive: Tensor, **problem: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows' and twins' normalisers, relative to the logits of `positive`, and the hardest negatives."""
    about = Problem(len(left), DOCS, SCALE, ContrastiveSpec(similarity="dot"), **problem)
    hardest = torch.full((len(left),), float("nan"), device=left.device)
    tile = Tile(direction, 0, len(left), 0, len(right), twins=(0, len(left)))
    objective = Objective.of(about, left.device)
    return *normalisers.fused_normalisers(tile, left, right, objective, positive, hardest), hardest


@pytest.fixture
def vectors(device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(SIZE, 45, device=device) / 5, torch.randn(DOCS, 45, device=device) / 5


@pytest.fixture(params=["one band", "a band for each tile"])
def bands(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "one band":
        monkeypatch.setattr(normalisers, "_PARTS_BYTES", 1)


def test_rows_twins_and_statistics(vectors: tuple[Tensor, Tensor], bands: None, poisoned_empty: None) -> None:
    queries, docs = vectors
    products = queries.double() @ docs.double().T
    positive = products.diagonal()
    rows, twins, hardest = fused("query_to_doc", queries, docs, positive.float())
    relative = SCALE * (products - positive[:, None])
    torch.testing.assert_close(rows.double(), relative.logsumexp(1), rtol=1e-6, atol=1e-6)
    relative = SCALE * (products[:, :SIZE] - positive)
    torch.testing.assert_close(twins.double(), relative.logsumexp(0), rtol=1e-6, atol=1e-6)
    nothing = torch.full((SIZE,), float("-inf"), dtype=torch.double, device=queries.device)
    negatives = products.diagonal_scatter(nothing)
    torch.testing.assert_close(hardest.double(), negatives.amax(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", ["query_to_query", "doc_to_doc"])
def test_symmetric_matrices_count_each_pair_once(
    direction: str, vectors: tuple[Tensor, Tensor], bands: None, poisoned_empty: None
) -> None:
    queries, docs = vectors
    left, right = (queries, queries) if direction == "query_to_query" else (docs[:SIZE], docs)
    positive = torch.linspace(-1, 2, SIZE, device=left.device)
    rows, twins, _ = fused(direction, left, right, positive)
    logits = SCALE * (left.double() @ right.double().T)
    row, column = torch.arange(SIZE, device=left.device)[:, None], torch.arange(len(right), device=left.device)
    logits[(column <= row) & (column < SIZE)] = float("-inf")
    logits[(column >= SIZE) & (column % SIZE == row) & (column < 2 * SIZE)] = float("-inf")
    own = SCALE * positive.double()
    torch.testing.assert_close(rows.double(), logits.logsumexp(1) - own, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(twins.double(), logits[:, :SIZE].logsumexp(0) - own, rtol=1e-6, atol=1e-6)


def test_rows_whose_every_pair_is_excluded(vectors: tuple[Tensor, Tensor], bands: None) -> None:
    queries, _ = vectors
    ids = torch.zeros(DOCS, dtype=torch.int64, device=queries.device)
    rows, twins, _ = fused("query_to_query", queries, queries, torch.ones(SIZE, device=queries.device), doc_ids=ids)
    assert torch.equal(rows, torch.full_like(rows, float("-inf")))
    assert torch.equal(twins, rows)


def test_a_great_spread_of_logits_neither_overflows_nor_drowns(device: torch.device) -> None:
    queries = torch.zeros(40, 1, device=device)
    queries[:, 0] = torch.linspace(-30, 30, 40)
    products = queries.double() @ queries.double().T
    positive = products.diagonal()
    rows, twins, _ = fused("query_to_doc", queries, queries, positive.float())
    expected = (SCALE * (products - positive[:, None])).logsumexp(1)
    torch.testing.assert_close(rows.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(twins, rows, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1_000, 32_768, 1_000_000])
def test_parts_stay_within_their_room(size: int) -> None:
    """By arithmetic, from the launches that a GPU would get."""
    left = torch.empty(size, 8, device="meta")
    with recorded(shared_memory=227 << 10) as launches:
        fused("query_to_doc", left, left, torch.empty(size, device="meta"))
    parts = [each.arguments[2:5] for each in launches if each.kernel is normalisers.normalisers_fwd_kernel]
    assert sum(row_parts.shape[1] for row_parts, *_ in parts) == size
    for tensors in parts:
        assert sum(part.nbytes for part in tensors) <= normalisers._PARTS_BYTES
