"""What the cases share: a batch over the processes, and what one process would make of it.

A batch is made whole in every process, from one seed, so that each knows what one process would get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tileloss.tiled import blocks, ring

CROSS = ("query_to_doc", "doc_to_query")
# how the columns come together, and by which backend they are computed
WAYS = [("gather", "tiled"), ("ring", "tiled"), ("gather", "reference")]
CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    """Register what every process runs."""
    CASES[function.__name__] = function
    return function


class Batch(NamedTuple):
    """A whole batch, the sizes of its parts, and which one is here."""

    columns: list[Tensor]
    sizes: list[int]

    @classmethod
    def random(cls, columns: int, even: bool = True, width: int = 5, dtype: torch.dtype = torch.float64) -> Batch:
        torch.manual_seed(columns)
        sizes = [7] * dist.get_world_size() if even else [9, 5, 8, 1][: dist.get_world_size()]
        return cls([torch.randn(sum(sizes), width).to(dtype) for _ in range(columns)], sizes)

    @property
    def rows(self) -> slice:
        first = sum(self.sizes[: dist.get_rank()])
        return slice(first, first + self.sizes[dist.get_rank()])

    @property
    def part(self) -> list[Tensor]:
        return [column[self.rows].clone() for column in self.columns]


def outcome(compute: Callable[..., Any], columns: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Loss, gradient of a scale and gradients of the columns; and the statistics, where there are any."""
    leaves = [column.clone().requires_grad_() for column in columns]
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    found = compute(leaves[0], torch.cat(leaves[1:]), scale=scale)
    loss, stats = found if isinstance(found, tuple) else (found, ())
    loss.backward()
    return [loss.detach(), gradient(scale), *map(gradient, leaves)], list(stats)


def gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def mean(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def assert_is_part_of(found: list[Tensor], whole: list[Tensor], batch: Batch) -> None:
    """Loss and gradients of the scale as means over the processes, gradients of columns after DDP's averaging."""
    of_all = [mean(x) for x in found[:2]]
    gradients = [x / dist.get_world_size() for x in found[2:]]
    expected = whole[:2] + [x[batch.rows] for x in whole[2:]]
    for a, b in zip(of_all + gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@contextmanager
def small_pieces(chunk_rows: int = 3, block_rows: int = 4, block_bytes: int = 1, min_rows: int = 4) -> Iterator[None]:
    """Chunks and blocks of a few rows, so that there are several of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ring.CHUNK_ROWS, "cpu", chunk_rows)
        patch.setitem(ring.BLOCK_ROWS, "cpu", block_rows)
        patch.setitem(blocks.BLOCK_BYTES, "cpu", block_bytes)
        patch.setitem(blocks.MIN_ROWS, "cpu", min_rows)
        yield


def compare_outcomes(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
