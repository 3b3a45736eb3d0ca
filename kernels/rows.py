"""Rows before the GEMMs and after them, in Triton: one kernel each way."""

from __future__ import annotations

from torch import Tensor

from tileloss.kernels import halves, unit_rows
from tileloss.similarity import NORM_FLOOR
from tileloss.tiled.rows import Rows


class TritonRows(Rows):
    """As `Rows`, in one read and one write; operands may keep a dtype narrower than that of the sums."""

    def unit_rows(self, x: Tensor, floor: float = NORM_FLOOR) -> tuple[Tensor, Tensor]:
        return unit_rows.unit_rows(x, self.operand_dtype, floor)

    def unit_rows_backward(
        self, dx: Tensor, x: Tensor, norms: Tensor, factor: float | Tensor, floor: float = NORM_FLOOR
    ) -> Tensor:
        return unit_rows.unit_rows_backward(dx, x, norms, factor, floor)

    def halves(self, x: Tensor) -> Tensor:
        return halves.halves(x)


class GuideRows(TritonRows):
    """How a guide's rows are read: as exact as float32, whatever their dtype."""

    def __init__(self, queries: Tensor, docs: Tensor) -> None:
        super().__init__(queries, docs)
        self.in_halves = halves.pays(len(queries), len(docs), queries.shape[1], queries.device)
