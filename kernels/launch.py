"""How kernels are started: on the tensor's device, with a configuration that no timing can make change the results.

Only what leaves every sum in the same order is tuned: the depth of the software pipeline and the order in which programs
visit the tiles. Tile shapes and warps, which do change the order of sums, are fixed functions of dtype and device. So a
tuned run and an untuned one give the same bits. What the tuner found is kept on disk and found again by later processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from tileloss.backend import interpreting

AUTOTUNE_VARIABLE = "TILELOSS_AUTOTUNE"  # "0": take the first configuration, for runs that must start at once


def tuned(configs: Sequence[triton.Config], key: Sequence[str]) -> Callable[[Any], Any]:
    """`triton.autotune` over `configs`; without tuning (interpreter, TILELOSS_AUTOTUNE=0) the first one is taken.

    Args:
        configs: differing in `num_stages` and in the order of programs alone, the safest first.
        key: names of the kernel's arguments whose change calls for another round of tuning.
    """
    fixed = interpreting() or os.environ.get(AUTOTUNE_VARIABLE) == "0"
    return triton.autotune(configs=list(configs[:1] if fixed else configs), key=list(key), cache_results=True)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start `kernel` on the device of its first argument, which need not be the current one."""
    device = arguments[0].device
    current = nullcontext() if device.type == "cpu" else torch.get_device_module(device.type).device(device)
    with current:
        kernel[grid](*arguments, **constants)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take on a device."""
    if interpreting():
        return 0
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["max_shared_mem"])


def bucket(*sizes: int) -> int:
    """One number for sizes that tune alike: each rounded up to a power of two, packed by their exponents."""
    packed = 0
    for size in sizes:
        packed = packed << 6 | (size - 1).bit_length()
    return packed


def as_scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """A 0-dim float32 tensor on `device`, so that kernels read a learnable factor without the host waiting for it."""
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float32).reshape(())
    return torch.full((), value, dtype=torch.float32, device=device)
