"""The hardest negative of each query in a block of similarities: the row's maximum and its first place in one pass.

One program a row, which reads it once. A NaN counts as larger than every number, as it does for `torch.max`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tileloss.kernels.chosen_pairs import pull_pairs
from tileloss.kernels.launch import launch
from tileloss.kernels.rows import TritonRows
from tileloss.kernels.unit_rows import block_of, warps_of
from tileloss.tiled.hardest import HardestPasses


@triton.jit
def hardest_fwd_kernel(
    block_ptr,  # (R, M) float32 similarities
    hardest_ptr,  # (R,)
    index_ptr,  # (R,) int64
    own_ptr,  # (R,)
    docs,
    block_stride,
    start,
    BLOCK: tl.constexpr,
):
    NOWHERE: tl.constexpr = 2147483647
    place = tl.program_id(0).to(tl.int64)
    row = start + place
    block_row = block_ptr + place * block_stride
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    chosen = tl.full((BLOCK,), NOWHERE, tl.int32)
    for first in range(0, docs, BLOCK):
        column = first + lanes
        similarity = tl.load(block_row + column, mask=(column < docs) & (column != row), other=float("-inf"))
        # strictly larger, so that each lane keeps the first of equals, and of the NaN
        better = (similarity > best) | ((similarity != similarity) & (best == best))
        best = tl.where(better, similarity, best)
        chosen = tl.where(better, column, chosen)
    is_nan = best != best
    peak = tl.max(tl.where(is_nan, float("-inf"), best), 0)
    has_nan = tl.max(is_nan.to(tl.int32), 0) > 0
    index = tl.min(tl.where(is_nan | ((best == peak) & (has_nan == 0)), chosen, NOWHERE), 0)
    tl.store(hardest_ptr + place, tl.where(has_nan, float("nan"), peak))
    tl.store(index_ptr + place, tl.where(index == NOWHERE, -1, index).to(tl.int64))
    tl.store(own_ptr + place, tl.load(block_row + row))


class TritonHardest(TritonRows, HardestPasses):
    """One kernel a pass; similarities, and the sums of gradients, in float32 whatever the operands."""

    def __init__(self, queries: Tensor, docs: Tensor) -> None:
        super().__init__(queries, docs)
        if queries.dtype == docs.dtype:
            self.operand_dtype = queries.dtype

    def row_maxima(self, block: Tensor, start: int, hardest: Tensor, index: Tensor, own: Tensor) -> None:
        rows, docs = block.shape
        width = block_of(docs)
        launch(
            hardest_fwd_kernel, (rows,), block, hardest, index, own, docs, block.stride(0), start,
            BLOCK=width, num_warps=warps_of(width),
        )  # fmt: skip

    def pull_pairs(
        self,
        weights: Tensor,
        partners: Tensor,
        left: Tensor,
        right: Tensor,
        d_left: Tensor | None,
        d_right: Tensor | None,
    ) -> None:
        pull_pairs(weights, partners, left, right, d_left, d_right)
