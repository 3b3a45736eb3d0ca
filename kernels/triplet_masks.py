"""The masks of valid pairs and triplets, straight from the labels in one kernel.

A program takes one anchor and a tile of its partners, whose labels it compares in their own dtype, and writes their
places in both pair masks; then, where triplets are wanted, it walks over the third row. Every byte is written once.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tileloss.kernels.launch import launch

_PARTNERS, _THIRDS = 16, 128


@triton.jit
def triplet_masks_fwd_kernel(
    labels_ptr,  # (B,) contiguous
    positive_ptr,  # (B, B) boolean
    negative_ptr,  # (B, B) boolean
    triplet_ptr,  # (B, B, B) boolean, where TRIPLETS
    size,
    TRIPLETS: tl.constexpr,
    PARTNERS: tl.constexpr,
    THIRDS: tl.constexpr,
):
    tiles = tl.cdiv(size, PARTNERS)
    anchor = tl.program_id(0) // tiles
    partner = tl.program_id(0) % tiles * PARTNERS + tl.arange(0, PARTNERS)
    there = partner < size
    label = tl.load(labels_ptr + anchor)
    same = tl.load(labels_ptr + partner, mask=there, other=0) == label
    positive = same & (partner != anchor)
    pair = anchor.to(tl.int64) * size + partner
    tl.store(positive_ptr + pair, positive, mask=there)
    tl.store(negative_ptr + pair, same == 0, mask=there)
    if TRIPLETS:
        triplet = triplet_ptr + (pair * size)[:, None]
        for first in range(0, size, THIRDS):
            third = first + tl.arange(0, THIRDS)
            # a third row of another label is neither of the two
            differs = tl.load(labels_ptr + third, mask=third < size, other=0) != label
            inside = there[:, None] & (third < size)[None, :]
            tl.store(triplet + third[None, :], positive[:, None] & differs[None, :], mask=inside)


def triplet_masks(
    labels: Tensor,  # (B,)
    triplets: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # (B, B), (B, B), (B, B, B) booleans
    """As `tileloss.reference.triplet_masks`; reads the labels, writes the masks."""
    labels = labels.contiguous()
    size = len(labels)
    positive = torch.empty(size, size, dtype=torch.bool, device=labels.device)
    negative = torch.empty_like(positive)
    triplet = torch.empty(size, size, size, dtype=torch.bool, device=labels.device) if triplets else None
    launch(
        triplet_masks_fwd_kernel, (size * triton.cdiv(size, _PARTNERS),), labels, positive, negative,
        negative if triplet is None else triplet, size, TRIPLETS=triplets, PARTNERS=_PARTNERS, THIRDS=_THIRDS,
        num_warps=4,
    )  # fmt: skip
    return positive, negative, triplet
