"""Which pairs and triplets of a labelled batch are valid, for those who mine on their own.

The losses of this package never make these masks: the triplets alone are B^3 bytes. On a GPU one kernel writes them
from the labels; elsewhere PyTorch does, without a temporary beside them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tileloss import reference
from tileloss.backend import accepts_backend, choose
from tileloss.errors import DtypeError, ShapeError
from tileloss.functional.checks import check_tensor
from tileloss.tiled.triplet_masks import triplet_masks as masks_in_place


class TripletMasks(NamedTuple):
    """Booleans, true where a pair or triplet is valid.

    Attributes:
        anchor_positive: (B, B), rows of one label, a row and itself left out.
        anchor_negative: (B, B), rows of two labels.
        triplet: (B, B, B), anchor, positive and negative; None unless asked for.
    """

    anchor_positive: Tensor  # (B, B)
    anchor_negative: Tensor  # (B, B)
    triplet: Tensor | None  # (B, B, B)


@accepts_backend
def triplet_masks(
    labels: Tensor,  # (B,) or (B, 1)
    *,
    triplets: bool = False,
    backend: str | None = None,
) -> TripletMasks:
    """Masks of the valid pairs, and on request triplets, of a batch.

    Args:
        labels: (B,) or (B, 1), integers, booleans or floats of any value; rows of equal labels are of one class. NaN
            equals nothing, itself included.
        triplets: also give the mask of triplets, (B, B, B): a gigabyte at B = 1,024.
        backend: "reference", "tiled", "triton" or "auto", for this call alone; see `tileloss.backend`.

    Returns:
        `TripletMasks`. Entry (a, p) of `anchor_positive` is true where a and p are two rows of one label; (a, n) of
        `anchor_negative` where their labels differ; (a, p, n) of `triplet` where both hold.

    Raises:
        ShapeError, DtypeError, InputError: for labels that do not fit, before any work.
        BackendError: for a backend that was asked for by name and cannot run.

    Cost:
        Time and memory 2 B^2 bytes, and B^3 bytes more with `triplets`; nothing beside the result.

    Source:
        Hermans, Beyer, Leibe 2017 (arXiv 1703.07737).

    >>> triplet_masks(torch.tensor([0, 0, 1])).anchor_positive
    tensor([[False,  True, False],
            [ True, False, False],
            [False, False, False]])
    """
    check_tensor("labels", labels)
    if labels.ndim not in (1, 2) or (labels.ndim == 2 and labels.shape[1] != 1):
        raise ShapeError(f"labels must have shape (B,) or (B, 1), got {tuple(labels.shape)}.")
    if labels.is_complex():
        raise DtypeError(f"labels must be integers or floats, got {labels.dtype}.")
    labels = labels.detach().reshape(-1)
    if len(labels) == 0:
        return TripletMasks(*reference.triplet_masks(labels, triplets))
    # the kernel compares labels of any dtype, and computes in none: the device alone decides
    chosen = choose(torch.empty(0, device=labels.device)).backend
    if chosen == "triton":
        positive, negative, triplet = _fused_masks(labels, triplets)
        return TripletMasks(positive, negative, triplet if triplets else None)
    masks = reference.triplet_masks if chosen == "reference" else masks_in_place
    return TripletMasks(*masks(labels, triplets))


@torch.library.custom_op("tileloss::triplet_masks", mutates_args=())
def _fused_masks(labels: Tensor, triplets: bool) -> tuple[Tensor, Tensor, Tensor]:
    from tileloss.kernels.triplet_masks import triplet_masks

    positive, negative, triplet = triplet_masks(labels, triplets)
    # an operator returns tensors only: a mask that nobody asked for is an empty one
    return positive, negative, positive.new_empty(0) if triplet is None else triplet


@_fused_masks.register_fake
def _(labels: Tensor, triplets: bool) -> tuple[Tensor, Tensor, Tensor]:
    size = len(labels)
    positive = labels.new_empty(size, size, dtype=torch.bool)
    triplet = labels.new_empty((size, size, size) if triplets else 0, dtype=torch.bool)
    return positive, torch.empty_like(positive), triplet
