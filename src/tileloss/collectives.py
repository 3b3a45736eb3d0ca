"""A batch over the processes of a `torch.distributed` group: which rows are here, and the exchange of the others.

The numbers of rows may differ between processes. Tensors go owner by owner, straight to and from where they belong in
the gathered one, because gloo's all-gather and reduce-scatter copy the whole of it once more; groups of equal parts on
other backends take those two, which NCCL has in one kernel. Every function here is a collective: all processes of the
group call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tileloss.tiled.part import Part

# the newer names first, since they warn of the older ones; a torch that is built without distribution has neither
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))


def backends(group: dist.ProcessGroup | None) -> dict[str, str]:
    """The backend of each kind of device that the group can exchange tensors of: {"cuda": "nccl"}."""
    return dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))


class GroupPart(Part):
    """The rows of this process, of a batch whose process r has `sizes[r]` queries."""

    is_whole = False

    def __init__(self, sizes: Sequence[int], group: dist.ProcessGroup | None = None, is_ring: bool = False) -> None:
        super().__init__(sum(sizes))
        self.group, self.is_ring = group, is_ring
        self.processes, self.rank = len(sizes), dist.get_rank(group)
        self.sizes, self.firsts = list(sizes), [0, *accumulate(sizes)][:-1]
        self.first = self.firsts[self.rank]
        self.last = self.first + sizes[self.rank]
        self.in_one_call = len(set(sizes)) == 1 and "gloo" not in backends(group).values()

    def total(self, docs: int) -> int:
        return docs // self.count * self.size

    def gathered(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.total(len(x)), *x.shape[1:])
        for column, rows in zip(out.split(self.size), x.contiguous().split(self.count), strict=True):
            if self.in_one_call:
                _all_gather(column, rows, group=self.group)
                continue
            column[self.rows] = rows
            self._with_every_owner(dist.broadcast, column)
        return out

    def own(self, x: Tensor) -> Tensor:
        columns = [column[self.rows] for column in x.split(self.size)]
        return columns[0] if len(columns) == 1 else torch.cat(columns)

    def returned(self, dx: Tensor) -> Tensor:
        found = []
        for column in dx.contiguous().split(self.size):
            if self.in_one_call:
                found.append(column.new_empty(self.count, *column.shape[1:]))
                _reduce_scatter(found[-1], column, group=self.group)
                continue
            self._with_every_owner(dist.reduce, column)
            found.append(column[self.rows])
        return torch.cat(found)  # a copy, so that the gathered sums are freed

    def _with_every_owner(
        self,
        collective: Callable[..., Any],
        column: Tensor,  # (size, ...)
    ) -> None:
        parts = enumerate(column.split(self.sizes))
        under_way = [collective(x, self._process(owner), group=self.group, async_op=True) for owner, x in parts]
        for work in under_way:
            work.wait()

    def _process(self, rank: int) -> int:
        """The number among all processes of a rank in the group."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def merged(self, normalisers: Tensor) -> Tensor:
        """As the base says, by two numbers a column: the largest, then the sum of the others relative to it.

        The largest one itself is counted apart from that sum, where it would cost the digits of small others.
        """
        peak = normalisers.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=self.group)
        is_peak = normalisers == peak
        sums = torch.stack([is_peak.to(peak.dtype), torch.where(is_peak, 0.0, (normalisers - peak).exp())])
        dist.all_reduce(sums, group=self.group)
        return peak + torch.log1p(sums[0] - 1.0 + sums[1])

    def pass_on(self, leaving: Tensor, arriving: Tensor) -> Callable[[], None]:
        neighbours = [self._process((self.rank + step) % self.processes) for step in (1, -1)]
        sides = zip((dist.isend, dist.irecv), (leaving, arriving), neighbours, strict=True)
        # where a process has no rows left, there is nothing to send and nothing to wait for
        calls = [dist.P2POp(call, x, to, self.group) for call, x, to in sides if x.numel()]
        under_way = dist.batch_isend_irecv(calls) if calls else []

        def wait() -> None:
            for work in under_way:
                work.wait()

        return wait

    def gathered_with_grad(self, x: Tensor) -> Tensor:
        return _Gathered.apply(x, self)


class _Gathered(torch.autograd.Function):
    """`gathered`, whose way back is `returned`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: GroupPart) -> Tensor:
        ctx.part = part
        return part.gathered(x)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        return _Returned.apply(d_out, ctx.part), None


class _Returned(torch.autograd.Function):
    """`returned`, whose way back is `gathered`."""

    @staticmethod
    def forward(ctx: Any, dx: Tensor, part: GroupPart) -> Tensor:
        ctx.part = part
        return part.returned(dx.clone())

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        return _Gathered.apply(d_out, ctx.part), None
