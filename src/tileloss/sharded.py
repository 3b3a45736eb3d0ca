"""Models whose parameters lie in pieces on several processes, and are run by all of them equally often.

What `fully_shard` or FullyShardedDataParallel made of a module brings the pieces together for the length of a forward
or backward, by collectives: a process that runs it once more than the others waits for them until the timeout.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from tileloss.agreement import agree

T = TypeVar("T")


def is_sharded(model: nn.Module) -> bool:
    """Whether the model, or a part of it, has its parameters in pieces."""
    return any(map(is_sharded_as_a_whole, model.modules()))


def is_sharded_as_a_whole(module: nn.Module) -> bool:
    """Whether calling this module is what brings its pieces together."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and who has sharded a model has imported it
    return fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))


def equally_many(cut: Callable[[], list[list[T]]]) -> tuple[list[list[T]], list[int]]:
    """What `cut` returns: of each column its mini-batches, the last one again as often as another process has more.

    Beside that, how many of each column are its own. Every process calls this: 24 bytes a process are gathered and
    waited for, once for the batch and once for each column.

    Raises:
        Exception: what `cut` raised here.
        InputError: on every process, when `cut` raised on another, or when the numbers of columns differ.
    """
    columns, _ = agree(cut, lambda found: (0, {"number of columns": len(found)}), None)
    padded = [column + column[-1:] * (max(_lengths(column)) - len(column)) for column in columns]
    return padded, [len(column) for column in columns]


def _lengths(column: Sequence[Any]) -> list[int]:
    """How many mini-batches of a column each process has."""
    return agree(lambda: column, lambda found: (len(found), {}), None)[1]
