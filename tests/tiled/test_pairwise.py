"""The walk over blocks: their size changes nothing, and no device makes all differences."""

import pytest
import torch

from tileloss.metrics import METRICS
from tileloss.tiled import blocks
from tileloss.tiled.pairwise import ManhattanDistance, pairwise_matrix, pairwise_matrix_backward
from tileloss.tiled.rows import Rows


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_the_size_of_blocks_changes_nothing(metric: str, within: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(50, 5, dtype=torch.float64), None if within else torch.randn(30, 5, dtype=torch.float64)
    grad = torch.randn(50, 50 if within else 30, dtype=torch.float64)
    found = []
    for rows in (64, 7, 1):
        monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", 1)
        monkeypatch.setitem(blocks.MIN_ROWS, "cpu", rows)
        matrix = pairwise_matrix(a, b, metric, True)
        found.append([matrix, *pairwise_matrix_backward(grad, a, b, matrix, metric, True, (True, b is not None))])
    for other in found[1:]:
        for x, y in zip(other, found[0], strict=True):
            assert x is y is None or torch.allclose(x, y, rtol=1e-12, atol=1e-12)


def test_where_differences_are_buffered_they_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU PyTorch's backward sums from a buffer of rows x columns x width: columns are cut to its room."""
    torch.manual_seed(0)
    left, right, slopes = torch.randn(6, 5), torch.randn(40, 5), torch.randn(6, 40)
    distance = ManhattanDistance(Rows(left))
    sums = []
    for room in (1 << 20, 6 * 5 * 4 * 7):
        monkeypatch.setattr(distance, "buffer_bytes", lambda _, room=room: room)
        d_left, d_right = torch.zeros_like(left), torch.zeros_like(right)
        distance.pull(slopes, left, right, d_left, d_right)
        sums.append((d_left, d_right))
    signs = (left[:, None] - right).sign()
    for d_left, d_right in sums:
        torch.testing.assert_close(d_left, -(slopes[:, :, None] * signs).sum(1))
        torch.testing.assert_close(d_right, (slopes[:, :, None] * signs).sum(0))
