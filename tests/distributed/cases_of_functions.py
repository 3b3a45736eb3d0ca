"""Functions over several processes are those of one."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from batches import CROSS, WAYS, Batch, assert_is_part_of, case, mean, outcome, small_pieces
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tileloss import collectives, distributed, functional
from tileloss.errors import FallbackWarning
from tileloss.guide import Guide
from tileloss.similarity import cos_sim, rowwise
from tileloss.spec import DIRECTIONS


def compare_with_one_process(batch: Batch, ids: Tensor | None = None, **options: Any) -> None:
    in_one = functools.partial(functional.contrastive_loss_with_stats, exclude=ids, backend="reference", **options)
    whole, stats = outcome(in_one, batch.columns)
    own_ids = None if ids is None else ids[batch.rows]
    for exchange, backend in WAYS:
        with small_pieces():
            found, own_stats = outcome(shared(exchange, backend, exclude=own_ids, **options), batch.part)
        assert_is_part_of(found, whole, batch)
        share = batch.sizes[dist.get_rank()] * dist.get_world_size() / sum(batch.sizes)
        torch.testing.assert_close(mean(torch.stack(own_stats) * share), torch.stack(stats), rtol=1e-5, atol=1e-6)


def shared(exchange: str, backend: str = "tiled", **options: Any) -> Callable[..., Any]:
    return functools.partial(distributed.contrastive_loss_with_stats, exchange=exchange, backend=backend, **options)


@case
def every_direction_and_partition() -> None:
    for directions, even in itertools.product(
        [DIRECTIONS[:1], CROSS, ("query_to_doc", "query_to_query"), ("query_to_doc", "doc_to_doc"), DIRECTIONS],
        [True, False],
    ):
        compare_with_one_process(Batch.random(3, even), directions=directions)
    compare_with_one_process(Batch.random(2, False), directions=CROSS, partition="per_direction")


@case
def every_similarity() -> None:
    @rowwise
    def own(a: Tensor, b: Tensor) -> Tensor:
        return cos_sim(a, b) - 0.1 * a.norm(dim=1, keepdim=True)

    for similarity in ("dot", "euclidean", "manhattan", own):
        compare_with_one_process(Batch.random(3, False), directions=DIRECTIONS, similarity=similarity)


@case
def a_similarity_of_which_nothing_is_known() -> None:
    def unknown(a: Tensor, b: Tensor) -> Tensor:
        return cos_sim(a, b) - b.norm(dim=1).mean()

    batch = Batch.random(2, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        whole, _ = outcome(functools.partial(functional.contrastive_loss, similarity=unknown), batch.columns)
        for exchange in distributed.EXCHANGES:
            found, _ = outcome(shared(exchange, "auto", similarity=unknown), batch.part)
            assert_is_part_of(found, whole, batch)


@case
def hardness() -> None:
    for mode in ("in_batch_negatives", "hard_negatives", "all_negatives"):
        compare_with_one_process(Batch.random(3, False), directions=CROSS, hardness=(mode, 2.0))


@case
def texts_that_occur_in_several_processes() -> None:
    batch = Batch.random(3, False)
    ids = torch.arange(sum(batch.sizes)) % 6
    compare_with_one_process(batch, ids, directions=DIRECTIONS)
    compare_with_one_process(batch, ids, hardness=("all_negatives", 1.5))


@case
def a_guide() -> None:
    """Without query_to_query, which stays in each process, it is the loss of one process."""
    batch, guide = Batch.random(3, False), Batch.random(4, False)
    for margin, directions in ((0.0, DIRECTIONS[:1]), (0.2, ("query_to_doc", "doc_to_doc"))):
        of_all, own = (
            {
                "exclude": Guide(queries, torch.cat([positives, negatives]), margin, "relative"),
                "directions": directions,
                "similarity": "torch_cosine",
            }
            for queries, positives, negatives, _ in (guide.columns, guide.part)
        )
        whole, _ = outcome(functools.partial(functional.contrastive_loss_with_stats, **of_all), batch.columns)
        for exchange, backend in WAYS:
            found, _ = outcome(shared(exchange, backend, **own), batch.part)
            assert_is_part_of(found, whole, batch)


@case
def narrow_embeddings() -> None:
    """Exchanged and summed in float32, and rounded once, at the end."""
    batch = Batch.random(3, False, dtype=torch.bfloat16)
    whole, _ = outcome(functools.partial(functional.contrastive_loss, directions=CROSS), batch.columns)
    for exchange, backend in WAYS:
        found, _ = outcome(shared(exchange, backend, directions=CROSS), batch.part)
        torch.testing.assert_close(mean(found[0]), whole[0], rtol=1e-5, atol=1e-6)
        for a, b in zip(found[2:], whole[2:], strict=True):
            assert a.dtype == torch.bfloat16
            torch.testing.assert_close(a / dist.get_world_size(), b[batch.rows], rtol=2e-2, atol=1e-3)


@case
def second_derivatives() -> None:
    batch, options = Batch.random(2), {"directions": CROSS, "scale": 2.0}

    def curvature(loss: Callable[..., Tensor], columns: list[Tensor]) -> list[Tensor]:
        """The gradient of the squared gradient."""
        leaves = [column.clone().requires_grad_() for column in columns]
        gradients = torch.autograd.grad(loss(*leaves, **options), leaves, create_graph=True)
        return list(torch.autograd.grad(sum((g**2).sum() for g in gradients), leaves))  # type: ignore[arg-type]

    whole = curvature(functional.contrastive_loss, batch.columns)
    for exchange in ("gather", "ring"):
        loss = functools.partial(distributed.contrastive_loss, exchange=exchange, backend="tiled")
        for a, b in zip(curvature(loss, batch.part), whole, strict=True):
            torch.testing.assert_close(a / dist.get_world_size() ** 2, b[batch.rows], rtol=1e-8, atol=1e-11)


@case
def two_runs_agree_bit_by_bit() -> None:
    batch = Batch.random(3, False, width=33, dtype=torch.float32)
    for exchange in ("gather", "ring"):
        with small_pieces():
            first, second = (outcome(shared(exchange, directions=DIRECTIONS), batch.part)[0] for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@case
def nothing_is_exchanged_for_gradients_that_nobody_wants() -> None:
    batch = Batch.random(2, False)
    queries, docs = batch.part
    whole = functional.contrastive_loss(*batch.columns, directions=CROSS)
    for exchange in ("gather", "ring"):
        with torch.no_grad():
            loss = distributed.contrastive_loss(queries, docs, exchange=exchange, directions=CROSS, backend="tiled")
        torch.testing.assert_close(mean(loss), whole)
        leaf = queries.clone().requires_grad_()
        distributed.contrastive_loss(leaf, docs, exchange=exchange, directions=CROSS, backend="tiled").backward()
        all_queries = batch.columns[0].clone().requires_grad_()
        functional.contrastive_loss(all_queries, batch.columns[1], directions=CROSS).backward()
        assert leaf.grad is not None
        assert all_queries.grad is not None
        torch.testing.assert_close(leaf.grad / dist.get_world_size(), all_queries.grad[batch.rows])


@case
def equal_parts_in_one_call() -> None:
    """The way of backends other than gloo."""
    made = collectives.GroupPart.__init__

    def in_one_call(self: collectives.GroupPart, *args: Any) -> None:
        made(self, *args)
        self.in_one_call = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives.GroupPart, "__init__", in_one_call)
        compare_with_one_process(Batch.random(3), directions=DIRECTIONS)


@case
def size_decides_between_gathering_and_the_ring() -> None:
    """By gathered documents and the sums of their gradient: rows of 5 float64, twice; queries count where gathered."""
    ways, made = [], collectives.GroupPart.__init__

    def noted(self: collectives.GroupPart, sizes: list[int], group: Any, is_ring: bool) -> None:
        ways.append(is_ring)
        made(self, sizes, group, is_ring)

    batch = Batch.random(3, False)
    gathered = 2 * sum(batch.sizes) * 5 * (8 + 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives.GroupPart, "__init__", noted)
        for limit, directions in ((gathered, CROSS), (gathered - 1, CROSS), (gathered, DIRECTIONS)):
            patch.setattr(distributed, "RING_FROM_BYTES", limit)
            compare_with_one_process_by("auto", batch, directions)
    assert ways == [False, True, True]


def compare_with_one_process_by(exchange: str, batch: Batch, directions: tuple[str, ...]) -> None:
    whole, _ = outcome(functools.partial(functional.contrastive_loss, directions=directions), batch.columns)
    found, _ = outcome(shared(exchange, directions=directions), batch.part)
    assert_is_part_of(found, whole, batch)


@case
def a_group_of_some() -> None:
    """Ranks in the group are not ranks among all."""
    members = [1, 3]
    if dist.get_world_size() <= max(members):
        return
    group = dist.new_group(members)
    if dist.get_rank() not in members:
        return
    torch.manual_seed(0)
    columns = [torch.randn(12, 5, dtype=torch.float64) for _ in range(2)]
    rows = slice(0, 5) if dist.get_rank() == 1 else slice(5, 12)
    whole, _ = outcome(functools.partial(functional.contrastive_loss, directions=CROSS), columns)
    for exchange in ("gather", "ring"):
        found, _ = outcome(shared(exchange, group=group, directions=CROSS), [column[rows] for column in columns])
        for a, b in zip(found[2:], whole[2:], strict=True):
            torch.testing.assert_close(a / 2, b[rows], rtol=1e-8, atol=1e-11)


@case
def a_ring_of_four_takes_half_the_memory_of_gathering() -> None:
    """With a quarter of the rows, and blocks and chunks a quarter the size, as of 4,096 rows in each process."""
    if dist.get_world_size() < 4:
        return
    columns = [torch.randn(1024, 384, requires_grad=True) for _ in range(2)]
    peaks = {}
    with small_pieces(chunk_rows=128, block_rows=256, block_bytes=4 << 20, min_rows=64):
        for exchange in ("gather", "ring"):
            for options in ({}, {"directions": CROSS}):
                with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
                    loss, _ = shared(exchange, **options)(*columns)
                held = peak = 0
                for event in trace.profiler.kineto_results.events():
                    if event.name() == "[memory]":
                        held += event.nbytes()
                        peak = max(peak, held)
                del loss
                peaks[exchange, len(options)] = peak
    for options in (0, 1):
        assert 2 * columns[0].nbytes < peaks["ring", options] <= peaks["gather", options] / 2, peaks
