"""Which part of which matrix a block of similarities is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Rows [start, stop) of one direction's matrix against its columns [first, last).

    Entries in the columns [twins[0], twins[1]) stand for two terms of the loss: their own row's, and the transposed
    pair's, which belongs to the row of the loss that carries the column's number.
    """

    direction: str
    start: int
    stop: int
    first: int
    last: int
    twins: tuple[int, int] = (0, 0)

    @property
    def rows(self) -> slice:
        """The rows, in the loss' numbering."""
        return slice(self.start, self.stop)

    @property
    def width(self) -> int:
        """The number of columns."""
        return self.last - self.first

    @property
    def twin_columns(self) -> slice:
        """The twin columns, in the block's numbering."""
        return slice(self.twins[0] - self.first, self.twins[1] - self.first)

    @property
    def twin_rows(self) -> slice:
        """The rows of the loss to which the twin columns belong."""
        return slice(*self.twins)

    @property
    def has_twins(self) -> bool:
        return self.twins[1] > self.twins[0]
