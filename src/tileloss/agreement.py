"""Processes that are about to exchange tensors find out first whether they can.

A process that raises alone leaves the others waiting for it, and tensors of different shapes end in garbage or a hang.
So everyone says first how many rows it has and, as a digest, what it is about to do: 24 bytes, gathered once a call.
If one has refused its input, or two do not mean the same, all raise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tileloss.collectives import backends
from tileloss.errors import DtypeError, InputError, ShapeError

T = TypeVar("T")
_ERRORS: dict[str, type[InputError]] = {"width": ShapeError, "document columns": ShapeError, "dtypes": DtypeError}


def agree(
    prepare: Callable[[], T],
    describe: Callable[[T], tuple[int, Mapping[str, Any]]],
    group: dist.ProcessGroup | None,
) -> tuple[T, list[int]]:
    """What `prepare` returns here, and the number of rows of each process, in the order of their ranks.

    Args:
        prepare: makes and checks the input of this process. What it raises, all processes learn.
        describe: of that, the number of rows, and by name what all processes must have the same.
        group: the processes; None for all.

    Raises:
        Exception: what `prepare` raised here.
        ShapeError, DtypeError, InputError: on every process, when `prepare` raised on another, or descriptions differ.
    """
    error: Exception | None = None
    value, rows = None, 0
    meant: Mapping[str, Any] = {}
    try:
        value = prepare()
        rows, meant = describe(value)
    except Exception as raised:
        error = raised
    digest = hashlib.blake2b(repr(sorted(meant.items())).encode(), digest_size=7).digest()
    mine = torch.tensor([error is None, rows, int.from_bytes(digest, "big")], device=_device(group))
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, mine, group)
    sound, sizes, digests = torch.stack(everyones).T.tolist()
    if all(sound) and len(set(digests)) == 1:
        assert value is not None
        return value, sizes
    told: list[Any] = [None] * len(sizes)
    dist.all_gather_object(told, (error and f"{type(error).__name__}: {error}", dict(meant)), group)
    if error is not None:
        raise error
    raise _disagreement(told)


def _disagreement(told: list[tuple[str | None, dict[str, Any]]]) -> InputError:
    """The error of a process whose own input is sound."""
    for rank, (refusal, _) in enumerate(told):
        if refusal is not None:
            return InputError(f"Process {rank} refused its input, so nothing was exchanged. {refusal}")
    first = told[0][1]
    for rank, (_, meant) in enumerate(told):
        for name in first:
            if meant[name] != first[name]:
                return _ERRORS.get(name, InputError)(
                    f"The processes must agree on the {name}: process 0 has {first[name]}, process {rank} has "
                    f"{meant[name]}."
                )
    raise AssertionError("equal descriptions have equal digests")


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where the group can exchange a few numbers: on the CPU if it can, for there nothing waits for a GPU."""
    devices = backends(group)
    if "cpu" in devices:
        return torch.device("cpu")
    kind = next(iter(devices))
    return torch.device(kind, torch.get_device_module(kind).current_device())
