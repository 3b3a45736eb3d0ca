"""The passes of triplet mining in Triton, for the driver in `tileloss.tiled.triplet`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from tileloss.kernels.chosen_pairs import pull_pairs
from tileloss.kernels.distances import DISTANCE_CODES
from tileloss.kernels.launch import launch
from tileloss.kernels.mine_all import mine_all_fwd_kernel
from tileloss.kernels.mine_hard import mine_hard_fwd_kernel
from tileloss.kernels.mine_semi_hard import mine_semi_hard_fwd_kernel
from tileloss.kernels.rows import TritonRows
from tileloss.kernels.softmax_rows import gradient_memory
from tileloss.kernels.unit_rows import warps_of
from tileloss.tiled.mining import Mining, MiningProblem

# positives at a time, in registers: what a batch of eight rows a class needs
_GROUP = 8
# columns at a time: against a group of positives for all triplets and for semi-hard ones, and against none
_WIDEST_ALL_BLOCK, _WIDEST_SEMI_HARD_BLOCK, _WIDEST_LONE_BLOCK = 512, 256, 1024
_THREADS_A_WARP = 64 if torch.version.hip else 32
# two to a thread are 14 % faster than one on an H100
_ALL_COLUMNS_A_THREAD = 2


class TritonMining(TritonRows, Mining):
    """One kernel a pass; distances, sums and what is found in float32 whatever the embeddings.

    Bfloat16 rows go to the tensor cores as they are, where their products are exact, and so do their slopes, rounded.
    Rows are raised to float32 where rounding would decide which triplets count, as that of unit rows for the cosine
    distance does, and where slopes may not fit, as a count over a small distance does not fit float16.
    """

    blocks_held = 2  # the products, and float32 sums under way

    def __init__(self, problem: MiningProblem, embeddings: Tensor) -> None:
        super().__init__(problem, embeddings)
        if embeddings.dtype == torch.bfloat16 and problem.distance != "cosine":
            self.operand_dtype = embeddings.dtype
        self._sums = torch.empty(0, device=embeddings.device)

    def all_triplets(
        self, start: int, block: Tensor, left_squares: Tensor | None, right_squares: Tensor | None, gradients: bool
    ) -> Tensor | None:
        slopes = gradient_memory(block, self.operand_dtype) if gradients else block
        memory = (block, slopes, self._sums_for(block) if gradients else block)
        self._launch_grouped(
            mine_all_fwd_kernel, _WIDEST_ALL_BLOCK, _ALL_COLUMNS_A_THREAD, memory, slopes, start, left_squares,
            right_squares, gradients,
        )  # fmt: skip
        return slopes if gradients else None

    def semi_hard(
        self, start: int, block: Tensor, left_squares: Tensor | None, right_squares: Tensor | None, gradients: bool
    ) -> Tensor | None:
        sums = self._sums_for(block) if gradients else block
        slopes = sums if self.operand_dtype == torch.float32 else gradient_memory(block, self.operand_dtype)
        memory = (block, sums, slopes)
        self._launch_grouped(
            mine_semi_hard_fwd_kernel, _WIDEST_SEMI_HARD_BLOCK, 1, memory, slopes, start, left_squares, right_squares,
            gradients,
        )  # fmt: skip
        return slopes if gradients else None

    def hard(self, start: int, block: Tensor, left_squares: Tensor | None, right_squares: Tensor | None) -> None:
        width = min(triton.next_power_of_2(self.problem.size), _WIDEST_LONE_BLOCK)
        launch(
            mine_hard_fwd_kernel, (len(block),), block, *self._squares(left_squares, right_squares),
            self.problem.classes.of, self.hardest_positive, self.hardest_negative, self.positive_index, self.negative,
            self.negative_index, self.problem.size, block.stride(0), start,
            DISTANCE=DISTANCE_CODES[self.problem.distance], BLOCK=width, num_warps=warps_of(width),
        )  # fmt: skip

    def pull_pairs(
        self,
        weights: Tensor,
        partners: Tensor,
        left: Tensor,
        right: Tensor,
        d_left: Tensor | None,
        d_right: Tensor | None,
        *,
        norms: bool = False,
    ) -> None:
        pull_pairs(weights, partners, left, right, d_left, d_right, norms=norms)

    def _launch_grouped(
        self,
        kernel: Any,
        widest: int,  # columns at a time
        columns_a_thread: int,
        memory: tuple[Tensor, Tensor, Tensor],  # the kernel's first arguments
        slopes: Tensor,  # (R, B): of which the kernel is told the stride
        start: int,
        left_squares: Tensor | None,  # (R,)
        right_squares: Tensor | None,  # (B,)
        gradients: bool,
    ) -> None:
        """Start a kernel that takes an anchor's positives in groups."""
        problem, block = self.problem, memory[0]
        width = min(triton.next_power_of_2(problem.size), widest)
        warps = max(width // (_THREADS_A_WARP * columns_a_thread), 1)
        launch(
            kernel, (len(block),), *memory, *self._squares(left_squares, right_squares), *problem.classes, self.total,
            self.active, self.hardest_positive, self.hardest_negative, problem.size, block.stride(0), slopes.stride(0),
            start, float(problem.margin), DISTANCE=DISTANCE_CODES[problem.distance], SOFT=problem.soft,
            GRADIENT=gradients, GROUP=_GROUP, BLOCK=width, num_warps=warps,
        )  # fmt: skip

    def _squares(self, left: Tensor | None, right: Tensor | None) -> tuple[Tensor, Tensor]:
        """The squared norms, or tensors in their place that no kernel reads."""
        return self.total if left is None else left, self.total if right is None else right

    def _sums_for(self, block: Tensor) -> Tensor:  # (R, B)
        """Memory for sums under way, the same for every block: the first is the largest."""
        if self._sums.numel() < block.numel():
            self._sums = torch.empty(block.numel(), dtype=torch.float32, device=block.device)
        return self._sums[: block.numel()].view(block.shape)
