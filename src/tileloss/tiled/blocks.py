"""How many rows of a matrix of similarities are computed at a time."""

from __future__ import annotations

import torch

# bytes of one block of similarities, measured on a CPU with 32 MB of third-level cache and set by arithmetic on GPUs;
# a narrower block drowns in the traffic of the right-hand gradient, which every block reads and writes whole
BLOCK_BYTES = {"cpu": 16 << 20, "cuda": 224 << 20}
MIN_ROWS = 64


def rows_per_block(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a block of `columns` columns: what fits `BLOCK_BYTES`, in steps of `MIN_ROWS`, and at most `rows`."""
    room = BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"])
    fitting = room // (columns * dtype.itemsize) // MIN_ROWS * MIN_ROWS
    return min(max(fitting, MIN_ROWS), rows)
