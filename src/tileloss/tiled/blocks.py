"""How many rows of a matrix of similarities are computed at a time."""

from __future__ import annotations

import torch

# bytes of one block of similarities, measured on a CPU with 32 MB of third-level cache; on a GPU what keeps a batch of
# 32,768 below 500 MB. A narrower block drowns in the traffic of the right-hand gradient, which every block reads and
# writes whole
BLOCK_BYTES = {"cpu": 16 << 20, "cuda": 272 << 20}
# rows that a block has even if that makes it larger: a GPU multiplies 512 of them at half the rate of 2,048, and for
# each block the host starts a dozen kernels
MIN_ROWS = {"cpu": 64, "cuda": 1536}
_STEP = 64


def rows_per_block(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a block of `columns` columns: what fits `BLOCK_BYTES`, at least `MIN_ROWS`, and at most `rows`."""
    return min(max(_fitting(columns, dtype, device), MIN_ROWS[_kind(device)]), rows)


def fit_one_block(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether all rows of a matrix of `columns` columns fit `BLOCK_BYTES`."""
    return rows <= _fitting(columns, dtype, device)


def _fitting(columns: int, dtype: torch.dtype, device: torch.device) -> int:
    return BLOCK_BYTES[_kind(device)] // (columns * dtype.itemsize) // _STEP * _STEP


def _kind(device: torch.device) -> str:
    return device.type if device.type in BLOCK_BYTES else "cuda"
