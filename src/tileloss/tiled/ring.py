"""The walk of the in-batch softmax loss over columns that go round: no process ever holds those of all.

The rows of a process stay; the rows that are columns travel in chunks from process to process. Two rounds: one for the
log-sum-exps of rows and columns, one for gradients, in which the gradient of a chunk travels with it, is added to by
everyone, and is complete when it comes home. Beside what a process holds of its own rows that takes four chunks: the
chunk that is here, the one that arrives, and the same of their gradients. The price is the fourth GEMM, which
objectives with doc_to_query pay anyway. A sum's order is that of the ring, so two runs agree bit by bit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import Tensor

from tileloss.tiled.walk import Matrix, Walk

# rows of a chunk, and of the block that meets it. Large enough for a GEMM and a message, small beside a batch; a block
# adds to the gradient of its chunk alone, so that it need not be wide
CHUNK_ROWS = {"cpu": 512, "cuda": 8192}
BLOCK_ROWS = {"cpu": 1024, "cuda": 8192}


class RingWalk(Walk):
    """As `Walk`, with statistics first whatever the objective, and each matrix a chunk of columns at a time."""

    finishes_rows = False
    keeps = False  # a matrix comes in chunks

    def _lay_out(self, wants_left: bool, wants_right: bool) -> None:
        self.d_left = self._zeros(len(self.left)) if wants_left else None
        self.d_right = self._zeros(len(self.right)) if wants_right else None
        self.positives = slice(self.part.count)
        self.chunk_rows = CHUNK_ROWS.get(self.queries.device.type, CHUNK_ROWS["cuda"])

    def _gather_back(self) -> None:
        """Nothing: all sums have come home."""

    def _walk(self) -> Tensor:
        return self._statistics_first()

    def _rows_per_block(self, columns: int) -> int:
        return min(BLOCK_ROWS.get(self.queries.device.type, BLOCK_ROWS["cuda"]), self.part.count)

    @functools.cached_property
    def shared_buffer(self) -> Tensor:
        return self._buffer(self._rows_per_block(self.chunk_rows) * self.chunk_rows)

    def _matrices(self, gradients: bool = False) -> Iterator[Matrix]:
        """Every matrix, as often as chunks of its columns come by."""
        count = self.part.count
        directions = [direction for direction in ("query_to_doc", "doc_to_doc") if self._has(direction)]
        for column in range(len(self.right) // count):
            rows = slice(column * count, (column + 1) * count)
            d_rows = self.d_right[rows] if self.d_right is not None and gradients else None
            yield from self._round(directions, self.right[rows], d_rows, column * self.problem.size)
        if self._has("query_to_query"):
            yield from self._round(["query_to_query"], self.left, self.d_left if gradients else None, 0)

    def _round(
        self,
        directions: list[str],
        rows: Tensor,  # (B, D): those that travel; everyone's are columns `first` and on
        d_rows: Tensor | None,  # (B, D): the sums that come home are added to it
        first: int,
    ) -> Iterator[Matrix]:
        """The matrices of one column of rows: chunk by chunk, and each chunk from one owner after the other."""
        part = self.part
        for start in range(0, max(part.sizes), self.chunk_rows):
            counts = [min(max(size - start, 0), self.chunk_rows) for size in part.sizes]
            own = slice(start, start + counts[part.rank])
            here, room = rows[own], rows.new_empty(2, max(counts), rows.shape[1])
            sums, sums_room, arrival = None, None, no_wait
            if d_rows is not None:
                sums_room = d_rows.new_empty(2, max(counts), d_rows.shape[1])
                sums = sums_room[0, : len(here)].zero_()
            for step in range(part.processes):
                upcoming = counts[part.rank - step - 1]
                is_last = step == part.processes - 1
                next_here = here if is_last else room[step % 2, :upcoming]
                next_arrival = no_wait if is_last else part.pass_on(here, next_here)
                arrival()  # of the sums of what is here, which the one before has just added to
                if len(here):
                    column = first + part.firsts[part.rank - step] + start
                    for direction in directions:
                        yield self._matrix(direction, here, sums, column)
                if sums is not None and sums_room is not None:
                    next_sums = sums_room[(step + 1) % 2, :upcoming]
                    arrival, sums = part.pass_on(sums, next_sums), next_sums
                next_arrival()
                here = next_here
            arrival()
            if sums is not None and d_rows is not None:
                d_rows[own] += sums

    def _matrix(self, direction: str, right: Tensor, d_right: Tensor | None, column: int) -> Matrix:
        left, d_left = self.left, self.d_left
        if direction == "doc_to_doc":
            left, d_left = self.right[self.positives], None if self.d_right is None else self.d_right[self.positives]
        return Matrix(direction, left, right, d_left, d_right, self.part.first, column)


def no_wait() -> None:
    """What there is to wait for when nothing is under way."""
