"""A few numbers of the host as a tensor on any device, without a copy.

A copy from ordinary memory makes the host wait for the device, and in a CUDA graph it is repeated at every replay from
memory that has long been given up. A kernel takes a number with its other arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def constants(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:  # (N,)
    """One kernel a number: for a handful of them."""
    found = torch.empty(len(numbers), dtype=dtype, device=device)
    for place, number in zip(found.unbind(), numbers, strict=True):
        place.fill_(number)
    return found
