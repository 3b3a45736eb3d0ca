"""Batches with nothing left to learn, in Triton: what the sums keep beside a positive that has won."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tileloss.functional import contrastive_loss
from tileloss.spec import DIRECTIONS

CLIP = ("query_to_doc", "doc_to_query")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "default": {},
    "rows at hand": {"directions": (*DIRECTIONS[:2], DIRECTIONS[3])},
    "hardness": {"hardness": ("all_negatives", 2.0)},
    "clip": {"directions": CLIP, "partition": "per_direction"},
    "clip, hardness": {"directions": CLIP, "partition": "per_direction", "hardness": ("all_negatives", 2.0)},
}


def with_gradients(queries: Tensor, docs: Tensor, backend: str, **options: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (queries, docs)]
    loss = contrastive_loss(*leaves, backend=backend, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("scale", [20.0, 40.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_of_nearly_nothing_has_all_its_digits(
    name: str, scale: float, device: torch.device, small_blocks: None, poisoned_empty: None
) -> None:
    torch.manual_seed(0)
    queries = torch.randn(100, 64, device=device)
    docs = queries + 0.1 * torch.randn(100, 64, device=device)
    options = {"scale": scale, **OBJECTIVES[name]}
    found = with_gradients(queries, docs, "triton", **options)
    eager = with_gradients(queries, docs, "reference", **options)
    truth = with_gradients(queries.double(), docs.double(), "reference", **options)
    assert 0 < truth[0] < 1e-3
    for place, (ours, theirs, exact) in enumerate(zip(found, eager, truth, strict=True)):
        error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (ours, theirs))
        assert error <= 3 * allowed + (1e-4 if place else 1e-5), place
    assert abs(found[0].double() - truth[0]) < 2e-5 * truth[0]


@pytest.mark.parametrize("directions", [CLIP[:1], CLIP])
def test_one_pair_costs_nothing(directions: tuple[str, ...], device: torch.device, poisoned_empty: None) -> None:
    x, y = torch.randn(2, 1, 5, device=device)
    loss, *gradients = with_gradients(x, y, "triton", directions=directions, partition="per_direction")
    assert loss == 0.0
    assert all((gradient == 0.0).all() for gradient in gradients)
    assert with_gradients(x * float("nan"), y, "triton", directions=directions, partition="per_direction")[0].isnan()
