"""Which rows of a batch are here, and what the walk over them needs to ask of wherever the others are.

A batch may be spread over processes. Each walks its own rows against the columns of all, in the numbering of the whole
batch: query g is row g, and document c of query g is column c * size + g. `Part` is a batch that is here as a whole,
where there is nobody to ask; `tileloss.collectives` has the one with other processes.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Part:
    """The rows [first, last) of a batch of `size` queries: here all of them."""

    processes = 1
    rank = 0
    first = 0
    is_whole = True
    is_ring = False  # whether the columns go round from process to process instead of being gathered

    def __init__(self, size: int) -> None:
        self.size = self.last = size
        self.sizes, self.firsts = [size], [0]  # rows of each process, and the number of its first

    @property
    def rows(self) -> slice:
        """The rows that are here, in the numbering of the whole batch."""
        return slice(self.first, self.last)

    @property
    def count(self) -> int:
        """The number of rows that are here."""
        return self.last - self.first

    def total(self, docs: int) -> int:
        """How many documents the whole batch has, if `docs` are here."""
        return docs

    def gathered(
        self,
        x: Tensor,  # (C * count, ...): C columns of the rows that are here
    ) -> Tensor:  # (C * size, ...)
        """The columns of the whole batch."""
        return x

    def own(
        self,
        x: Tensor,  # (C * size, ...)
    ) -> Tensor:  # (C * count, ...)
        """The rows that are here, of gathered columns."""
        return x

    def returned(
        self,
        dx: Tensor,  # (C * size, ...): may be overwritten
    ) -> Tensor:  # (C * count, ...)
        """The sum over all processes, each of which gets that of its own rows: the way back from `gathered`."""
        return dx

    def merged(
        self,
        normalisers: Tensor,  # (..., size) log-sum-exps
    ) -> Tensor:
        """The log-sum-exps of the terms of all processes."""
        return normalisers

    def pass_on(
        self,
        leaving: Tensor,  # (R, D): goes to the next process
        arriving: Tensor,  # (S, D): is overwritten by what the one before passes on
    ) -> Callable[[], None]:
        """Begin to pass rows on; what is returned waits for the end. Until then neither tensor may be written to."""
        arriving.copy_(leaving)
        return lambda: None

    def gathered_with_grad(
        self,
        x: Tensor,  # (C * count, D)
    ) -> Tensor:  # (C * size, D)
        """As `gathered`, differentiable any number of times."""
        return x
