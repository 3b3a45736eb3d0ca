"""What losses with in-batch negatives have in common: the call, over one process or all, and its statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tileloss.distributed import loss_of_batch
from tileloss.functional.contrastive import ContrastiveStats, stats_of
from tileloss.losses.prefixes import Prefixes, in_batch_loss
from tileloss.reference.contrastive import Seen

# similarities that may be kept for statistics that nobody may ask for: 4 MB of them in float32
_KEPT = 1 << 20


class InBatchLoss(nn.Module):
    """A loss whose statistics are made when they are asked for, because small batches feel the making."""

    gather_across_devices: bool | str
    _prefixes: Prefixes | None = None
    _seen: Tensor | Seen | ContrastiveStats | None = None

    def _loss_of(self, inputs: Callable[[], dict[str, Any]]) -> Tensor:
        """The loss (0-dim) of what `inputs` checks and gives: arguments of `tileloss.functional.contrastive_loss`.

        Leaves behind what its statistics are made of, or, where that is much, the statistics.
        """
        seen: Tensor | Seen | ContrastiveStats
        if self.gather_across_devices:
            loss, seen = loss_of_batch(inputs, self.gather_across_devices)
        else:
            loss, seen = in_batch_loss(self._prefixes, **inputs())
        if isinstance(seen, Seen) and seen.similarities.numel() > _KEPT:
            seen = stats_of(seen)
        self.__dict__["_seen"] = seen  # past the module's own setter, whose time a small batch feels too
        return loss

    @property
    def stats(self) -> ContrastiveStats | None:
        """The statistics of the last call, detached, and anew at every look. None before the first."""
        seen = self._seen  # a CUDA graph writes to it without a call, so what was made of it may not be kept
        return stats_of(seen) if isinstance(seen, Tensor | Seen) else seen

    @stats.setter
    def stats(self, stats: ContrastiveStats | None) -> None:
        """Setting them to None forgets the last call, and frees what it left behind; a subclass may set its own."""
        self.__dict__["_seen"] = stats
