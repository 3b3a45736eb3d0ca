"""From similarities to logits inside a kernel: which pairs are candidates, and what each is multiplied by.

The two pieces that every kernel over similarities shares, for tiles of any shape: `row` and `column` broadcast against
each other and against the similarities. Features that are off are constexpr, so that they cost nothing.

Logits are in base 2, because the hardware's exponential is: a logit here is log2(e) times the logit of the loss. As
everywhere, they are relative to the positive's.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tileloss.kernels.launch import as_scalar
from tileloss.tiled.passes import Problem

QUERY_TO_DOC = tl.constexpr(0)
QUERY_TO_QUERY = tl.constexpr(1)
DOC_TO_DOC = tl.constexpr(2)
DIRECTION_CODES = {"query_to_doc": 0, "query_to_query": 1, "doc_to_doc": 2}

IN_BATCH = tl.constexpr(1)
OWN_HARD = tl.constexpr(2)
HARDNESS_CODES = {None: 0, "in_batch_negatives": 1, "hard_negatives": 2, "all_negatives": 3}

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def is_own(row, column, size, docs):
    """Whether the document belongs to the row's query: so it is in every full column of `size` documents."""
    return (column % size == row) & (column < docs // size * size)


@triton.jit
def candidates(
    similarity,
    row,
    column,
    inside,  # whether the entry exists at all
    row_id,  # the ids of `row`, where HAS_IDS
    ids_ptr,  # (M,)
    mask_ptr,  # (B, M) boolean
    mask_row_stride,
    mask_column_stride,
    size,
    docs,
    DIRECTION: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """The similarities, with minus infinity where the column is no candidate of the row."""
    keep = inside
    if HAS_IDS:
        same = tl.load(ids_ptr + column, mask=column < docs, other=0) == row_id
        if DIRECTION == QUERY_TO_DOC:
            same = same & ~is_own(row, column, size, docs)
        keep = keep & ~same
    if DIRECTION == QUERY_TO_DOC and HAS_MASK:
        offset = row.to(tl.int64) * mask_row_stride + column.to(tl.int64) * mask_column_stride
        ruled_out = tl.load(mask_ptr + offset, mask=inside, other=0) != 0
        keep = keep & (~ruled_out | (column == row))
    if DIRECTION == QUERY_TO_QUERY:
        keep = keep & (column != row)
    if DIRECTION == DOC_TO_DOC:
        keep = keep & ~is_own(row, column, size, docs)
    return tl.where(keep, similarity, float("-inf"))


@triton.jit
def guided_candidates(
    similarity,
    row,
    column,
    inside,
    guide_ptr,  # where the guide's similarities of these entries begin
    threshold,  # of the row
    DIRECTION: tl.constexpr,
):
    """As `candidates`, by a guide: what is above the threshold is none, but for the query's own positive."""
    ruled_out = tl.load(guide_ptr + column, mask=inside, other=0.0) > threshold
    if DIRECTION == QUERY_TO_DOC:
        ruled_out = ruled_out & (column != row)
    return tl.where(inside & ~ruled_out, similarity, float("-inf"))


@triton.jit
def to_logits(
    similarity,
    positive,  # the positive's similarity, of the row of the loss to which the logit belongs
    row,
    column,
    scale,
    strength,
    size,
    docs,
    DIRECTION: tl.constexpr,
    HARDNESS: tl.constexpr,
):
    """Base-2 logits, less the positive's: times the scale, plus the strength where the hardness mode chose the pair.

    A difference first and a product then, so that the positive's own logit is zero to the last bit.
    """
    logit_scale = scale * LOG2_E
    if DIRECTION != QUERY_TO_DOC or HARDNESS == 0:
        return (similarity - positive) * logit_scale
    own = is_own(row, column, size, docs)
    if HARDNESS == IN_BATCH:
        chosen = ~own
    elif HARDNESS == OWN_HARD:
        chosen = own & (column >= size)
    else:
        chosen = column != row
    weighed = similarity * ((scale + strength) * LOG2_E) - positive * logit_scale
    return tl.where(chosen, weighed, (similarity - positive) * logit_scale)


class Objective(NamedTuple):
    """A problem as the kernels take it: tensors and numbers to pass on, and what is compiled in."""

    arguments: tuple[Tensor | int | float, ...]  # ids, mask and its strides, scale, strength, size, docs
    constants: dict[str, int | bool]

    @classmethod
    def of(cls, problem: Problem, device: torch.device) -> Objective:
        """An exclusion that is not there is stood in for by the scale, which no kernel then reads as one."""
        spec, ids, mask = problem.spec, problem.doc_ids, problem.mask
        scale = as_scalar(problem.scale, device)
        mask_strides = (0, 0) if mask is None else mask.stride()
        return cls(
            (
                scale if ids is None else ids.contiguous(),
                scale if mask is None else mask,
                *mask_strides,
                scale,
                float(spec.hardness_strength),
                problem.size,
                problem.docs,
            ),
            {
                "HAS_IDS": ids is not None,
                "HAS_MASK": mask is not None,
                "HARDNESS": HARDNESS_CODES[spec.hardness] if spec.weighs_hardness else 0,
            },
        )
