"""How kernels are started: on the tensor's device, with a configuration that no timing can make change the results.

Only what leaves every sum in the same order is tuned: the depth of the software pipeline, the registers for a thread
and the order in which programs visit the tiles. Tile shapes and warps, which do change the order of sums, are fixed
functions of dtype and device. So a tuned run and an untuned one give the same bits. What the tuner found is kept on
disk and found again by later processes.

Launches can also be recorded instead of run, for a GPU that is not there: the compile report compiles what it
recorded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tileloss.backend import interpreting

AUTOTUNE_VARIABLE = "TILELOSS_AUTOTUNE"  # "0": take the first configuration, for runs that must start at once


class Launch(NamedTuple):
    """One start of a kernel: its positional arguments, its constexpr arguments and options."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class _Recording(NamedTuple):
    launches: list[Launch]
    shared_memory: int


_recording: _Recording | None = None


@contextmanager
def recorded(shared_memory: int) -> Iterator[list[Launch]]:
    """Launches made inside the block are listed, not run, and take the GPU to have this much memory for a program.

    Tensors may live on the "meta" device: none is read or written.
    """
    global _recording
    _recording = _Recording([], shared_memory)
    try:
        yield _recording.launches
    finally:
        _recording = None


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
    if _recording is not None:
        _recording.launches.append(Launch(kernel, arguments, constants))
        return
    device = arguments[0].device
    module = torch.get_device_module(device.type)
    is_current = device.type == "cpu" or device.index == module.current_device()  # asking costs less than setting
    with nullcontext() if is_current else module.device(device):
        kernel[grid](*arguments, **constants)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take on a device; none in the interpreter."""
    if _recording is not None:
        return _recording.shared_memory
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
        if value.dtype == torch.float32 and value.ndim == 0 and value.device == device:
            return value  # as it is asked for: every block of a batch has one
        return value.detach().to(device, torch.float32).reshape(())
    return torch.full((), value, dtype=torch.float32, device=device)
