"""The gradient of a block's logits, where it is stored and how exactly."""

import pytest
import torch
from torch import Tensor

from tileloss.kernels import TritonPasses, unit_rows
from tileloss.spec import ContrastiveSpec
from tileloss.tiled.passes import Problem
from tileloss.tiled.tile import Tile

ROWS, COLUMNS = 5, 300


def passes_and_block(dtype: torch.dtype, device: torch.device) -> tuple[TritonPasses, Tensor, Tensor]:
    """Passes, a block of similarities whose probabilities span 1 to 1e-8, and these, less the positives' one."""
    torch.manual_seed(0)
    spec = ContrastiveSpec(similarity="dot", directions=("query_to_doc", "doc_to_query"), partition="per_direction")
    embeddings = torch.empty(COLUMNS, 3, dtype=dtype, device=device)
    passes = TritonPasses(Problem(COLUMNS, COLUMNS, 1.0, spec), embeddings, embeddings)
    block = 18 * torch.rand(ROWS, COLUMNS, device=device)
    block.diagonal().fill_(18.0)
    expected = block.double().softmax(dim=1)
    expected.diagonal().sub_(1.0)
    return passes, block, expected


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_probability_survives_its_storage(
    dtype: torch.dtype, narrow: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each to the dtype's relative precision: none drowns below the smallest float16, none is overwritten unread."""
    if narrow:
        monkeypatch.setattr(unit_rows, "_WIDEST_BLOCK", 32)
    passes, block, expected = passes_and_block(dtype, device)
    memory = block.data_ptr()
    tile = Tile("query_to_doc", 0, ROWS, 0, COLUMNS)
    normaliser, (gradient,) = passes.softmax_gradient([tile], block, True)
    assert gradient.dtype == dtype
    assert gradient.data_ptr() == memory
    torch.testing.assert_close(gradient.double() / passes.gradient_unit, expected, rtol=1e-3, atol=1e-9)

    passes, block, _ = passes_and_block(dtype, device)
    rows = torch.full((COLUMNS,), float("nan"), device=device)
    rows[:ROWS] = normaliser
    passes.positive.fill_(18.0)
    no_twins = torch.full((COLUMNS,), float("inf"), device=device)
    expected.diagonal().sub_(1.0)  # the positive counts once for each partition
    gradient = passes.gradient(Tile("query_to_doc", 0, ROWS, 0, COLUMNS, (0, COLUMNS)), block, rows, no_twins)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double() / passes.gradient_unit, expected, rtol=1e-3, atol=1e-9)


def test_twins_add_the_transposed_term(device: torch.device) -> None:
    passes, block, _ = passes_and_block(torch.float32, device)
    normaliser = torch.linspace(0, 8, COLUMNS, device=device)
    passes.positive.copy_(torch.linspace(17, 18, COLUMNS))
    similarities, positive = block.double(), passes.positive.double()
    tile = Tile("query_to_query", 0, ROWS, 0, COLUMNS, twins=(ROWS, 100))
    gradient = passes.gradient(tile, block, normaliser, normaliser)
    expected = (similarities - (positive + normaliser)[:ROWS, None]).exp()
    expected[:, ROWS:100] += (similarities - positive - normaliser)[:, ROWS:100].exp()
    expected.diagonal().zero_()
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-9)
