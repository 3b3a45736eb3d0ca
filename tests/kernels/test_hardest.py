"""The maximum of each row of a block and its first place."""

import pytest
import torch
from torch import Tensor

from tileloss.kernels import unit_rows
from tileloss.kernels.hardest import TritonHardest


@pytest.fixture(autouse=True)
def _narrow_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_rows, "_WIDEST_BLOCK", 32)


def maxima(block: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
    hardest, own = torch.empty(2, len(block), device=block.device)
    index = torch.empty(len(block), dtype=torch.int64, device=block.device)
    TritonHardest(block, block).row_maxima(block, start, hardest, index, own)
    return hardest, index, own


def expected(block: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
    block = block.clone()
    own = block.diagonal(start).clone()
    block.diagonal(start).fill_(float("-inf"))
    return *block.max(dim=1), own


@pytest.mark.parametrize(("rows", "columns", "start"), [(1, 2, 0), (5, 33, 28), (7, 100, 0), (3, 257, 100)])
def test_as_torch_max(rows: int, columns: int, start: int, device: torch.device, poisoned_empty: None) -> None:
    block = torch.randn(rows, columns, device=device)
    for found, right in zip(maxima(block, start), expected(block, start), strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("lanes", [32, 64])
def test_the_first_of_equals(lanes: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_rows, "_WIDEST_BLOCK", lanes)
    torch.manual_seed(0)
    block = torch.randint(0, 3, (40, 200), device=device).float()
    block[:, :20] = 0.0
    for found, right in zip(maxima(block, 7), expected(block, 7), strict=True):
        assert torch.equal(found, right)


def test_a_nan_is_seen(device: torch.device) -> None:
    block = torch.randn(3, 100, device=device)
    block[0, [40, 70, 75]] = block[1, 33] = float("nan")
    hardest, index, _ = maxima(block, 33)
    assert hardest[0].isnan()
    assert index[0] == 40
    assert hardest[1].isnan()
    assert torch.equal(hardest[2], expected(block, 33)[0][2])


def test_no_other_document(device: torch.device) -> None:
    hardest, index, own = maxima(torch.full((1, 1), 0.5, device=device), 0)
    assert hardest.item() == float("-inf")
    assert index.item() == -1
    assert own.item() == 0.5
