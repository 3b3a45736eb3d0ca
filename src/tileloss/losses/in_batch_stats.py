"""The statistics that losses with in-batch negatives keep of their last call."""

from __future__ import annotations

from torch import Tensor

from tileloss.functional.contrastive import ContrastiveStats, stats_of
from tileloss.reference.contrastive import Seen

# similarities that may be kept for statistics that nobody may ask for: 4 MB of them in float32
_KEPT = 1 << 20


class InBatchStats:
    """A loss whose statistics are made when they are asked for, because small batches feel the making."""

    _seen: Tensor | Seen | ContrastiveStats | None = None

    def _see(self, seen: Tensor | Seen | ContrastiveStats) -> None:
        """Keep what the statistics of this call are made of, or, where that is much, the statistics."""
        if isinstance(seen, Seen) and seen.similarities.numel() > _KEPT:
            seen = stats_of(seen)
        self.__dict__["_seen"] = seen  # past the module's own setter, whose time a small batch feels too

    @property
    def stats(self) -> ContrastiveStats | None:
        """The statistics of the last call, detached, and anew at every look. None before the first."""
        seen = self._seen  # a CUDA graph writes to it without a call, so what was made of it may not be kept
        return stats_of(seen) if isinstance(seen, Tensor | Seen) else seen

    @stats.setter
    def stats(self, stats: ContrastiveStats | None) -> None:
        """Setting them to None forgets the last call, and frees what it left behind; a subclass may set its own."""
        self.__dict__["_seen"] = stats
