"""Cosines and their gradients as exact as float32 makes them, multiplied in float16.

On a data centre's GPU float16 products with float32 sums run ten times and more as fast as float32 ones. A number in
two halves, `hi` the nearest float16 and `lo` what that leaves, keeps 22 of float32's 24 bits, and

    x y = hi hi + hi lo + lo hi

but for what is smaller still. Rows of unit length need no scale for that: half of the smallest float16 is 3e-8. The
small terms come first, because a tensor core cuts off what lies below the last digit of the sum so far, and a deep sum
is taken in parts for the same reason.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tileloss.tiled.matmul import accumulate, multiply
from tileloss.tiled.rows import Rows
from tileloss.tiled.similarity import PAIRED_ROWS, Cosine

# the gradients' low halves are held times this, so that probabilities of 1e-14 still have some
LOW_SCALE = 2.0**11
# terms that a tensor core adds up before float32 takes over: at 32,768 of them the cut-off digits came to 3e-5
_DEEPEST_SUM = 4096


class CosineInHalves(Cosine):
    """As `Cosine`; a prepared row is its unit row in halves, (3 D,) of `hi`, `lo` and `hi` again, in float16.

    One GEMM of three times the depth forward, three for the left side backward and two, of three's work, for the
    right. Memory: the prepared rows are half as large again as in float32, and a block's gradient is held twice.
    """

    def __init__(self, rows: Rows, floor: float) -> None:
        super().__init__(rows)
        self.floor = floor

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        unit, norms = self.rows.unit_rows(x, self.floor)
        prepared = torch.empty(len(x), 3 * x.shape[1], dtype=torch.float16, device=x.device)
        high, low, again = _thirds(prepared)
        high.copy_(unit)
        low.copy_(unit.sub_(high))
        again.copy_(high)
        return prepared, norms

    def values(self, x: Tensor) -> Tensor:
        high, low, _ = _thirds(x)
        return high.to(self.rows.dtype).add_(low)

    def left_operand(self, x: Tensor) -> Tensor:
        high, low, _ = _thirds(x)
        return torch.cat([low, high, high], dim=1)

    def fill(self, out: Tensor, x: Tensor, y: Tensor) -> Any:
        multiply(self.left_operand(x), y.t(), out=out)

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(x.split(PAIRED_ROWS), y.split(PAIRED_ROWS), strict=True)
        return torch.cat([self.values(a).mul_(self.values(b)).sum(dim=1) for a, b in pairs])

    def pull(self, grad: Tensor, x: Tensor, y: Tensor, saved: Any, dx: Tensor | None, dy: Tensor | None) -> None:
        both = self.rows.halves(grad)
        high, low = both
        if dx is not None:
            y_high, y_low, _ = _thirds(y)
            accumulate(dx, low, y_high, factor=1 / LOW_SCALE)
            accumulate(dx, high, y_low)
            for columns, rows in zip(high.split(_DEEPEST_SUM, dim=1), y_high.split(_DEEPEST_SUM), strict=True):
                accumulate(dx, columns, rows)
        if dy is not None:
            x_high, x_low, _ = _thirds(x)
            crossed = torch.cat([x_low * LOW_SCALE, x_high])
            accumulate(dy, both.flatten(0, 1).t(), crossed, factor=1 / LOW_SCALE)
            accumulate(dy, high.t(), x_high)

    def finish(self, dx: Tensor, x: Tensor, saved: Tensor | None, factor: float | Tensor) -> Tensor:
        return super().finish(dx, self.values(x), saved, factor)


def _thirds(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The halves of prepared rows, (N, D) each: high, low, and high again."""
    high, low, again = x.tensor_split(3, dim=1)
    return high, low, again
