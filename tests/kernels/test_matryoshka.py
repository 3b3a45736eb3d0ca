"""All prefix widths in Triton: the passes of the norms, and the whole of the backend against float64.

float32 rows share their products; narrower ones go width by width. The rule is that of `test_contrastive.py`.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tileloss import Guide
from tileloss.backend import interpreting
from tileloss.functional import matryoshka_contrastive_loss_with_stats
from tileloss.kernels.prefix_passes import TritonPrefixPasses
from tileloss.reference.contrastive import contrastive_loss
from tileloss.spec import DIRECTIONS, ContrastiveSpec
from tileloss.tiled.prefix_passes import PrefixPasses

CLIP = ("query_to_doc", "doc_to_query")
OWN_SIDES = ("query_to_doc", "query_to_query", "doc_to_doc")
HALF = torch.float16 if interpreting() else torch.bfloat16  # the interpreter's bfloat16 dot is wrong
WEIGHTS = {65: 1.0, 16: 0.5}
CASES: dict[str, tuple[int, int, torch.dtype, str, dict[str, Any]]] = {
    "one row": (1, 1, torch.float32, "", {}),
    "63 rows": (63, 63, torch.float32, "", {}),
    "own sides, ids": (20, 40, torch.float32, "ids", {"directions": OWN_SIDES}),
    "guide": (20, 40, torch.float32, "guide", {"directions": OWN_SIDES}),
    "hardness": (20, 40, torch.float32, "", {"hardness": ("all_negatives", 2.0)}),
    "clip": (63, 70, torch.float32, "", {"directions": CLIP, "partition": "per_direction"}),
    "four directions, mask": (20, 20, torch.float32, "mask", {"directions": DIRECTIONS}),
    "width by width": (20, 20, HALF, "", {}),
    "width by width, clip": (20, 40, HALF, "ids", {"directions": CLIP}),
}


def excluded(kind: str, size: int, count: int, device: torch.device) -> Tensor | Guide | None:
    if kind == "ids":
        return torch.randint(0, size // 2, (count,), device=device)
    if kind == "mask":
        return torch.rand(size, count, device=device) < 0.3
    rows = torch.randn(size + count, 7, device=device)
    return Guide(*rows.split([size, count]), margin=0.2) if kind == "guide" else None


def run(inputs: list[Tensor], options: dict[str, Any], backend: str) -> tuple[list[Tensor], Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss, stats = matryoshka_contrastive_loss_with_stats(
        leaves[0], leaves[1], dims=WEIGHTS, scale=leaves[2], backend=backend, **options
    )
    gradients = torch.autograd.grad(loss, leaves)
    return [loss.detach(), *gradients], torch.stack([torch.stack(tuple(s)) for s in stats.values()])


def eager(inputs: list[Tensor], options: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """The formula in the dtype throughout, as PyTorch would compute it without the library."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    exclude = options.get("exclude")
    settings = {key: value for key, value in options.items() if key != "exclude"}
    hardness = settings.pop("hardness", (None, 0.0))
    spec = ContrastiveSpec(
        lambda a, b: F.normalize(a, dim=1) @ F.normalize(b, dim=1).T, **settings, hardness=hardness[0],
        hardness_strength=hardness[1],
    )  # fmt: skip
    ids = exclude if isinstance(exclude, Tensor) and exclude.dtype == torch.int64 else None
    mask = exclude if isinstance(exclude, Tensor) and exclude.dtype == torch.bool else None
    guide = exclude if isinstance(exclude, Guide) else None
    loss = sum(
        weight * contrastive_loss(leaves[0][:, :dim], leaves[1][:, :dim], leaves[2], spec, ids, mask, guide)[0]
        for dim, weight in WEIGHTS.items()
    )
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm().clamp_min(1e-6)).item() for a, b in zip(found, truth, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_the_eager_formula(
    name: str, device: torch.device, small_blocks: None, poisoned_empty: None
) -> None:
    size, count, dtype, kind, options = CASES[name]
    torch.manual_seed(0)
    queries, docs = torch.randn(size, 65, device=device), torch.randn(count, 65, device=device)
    docs[:size] += queries
    inputs = [queries.to(dtype), docs.to(dtype), torch.tensor(10.0, device=device)]
    options = options | {"exclude": excluded(kind, size, count, device)}
    truth, stats = run([x.double() for x in inputs], options, "reference")
    found, seen = run(inputs, options, "triton")
    allowed = errors(eager(inputs, options, dtype), truth)
    for error, limit, slack in zip(errors(found, truth), allowed, (1e-5, 1e-4, 1e-4, 1e-4), strict=True):
        assert error <= 3 * limit + slack
    torch.testing.assert_close(seen, stats, rtol=0.02, atol=0.02)
    if name in ("one row", "clip"):
        again, _ = run(inputs, options, "triton")
        assert all(map(torch.equal, found, again)), "two runs must give the same bits"


def test_loss_alone(device: torch.device, small_blocks: None) -> None:
    torch.manual_seed(0)
    queries, docs = torch.randn(2, 20, 65, device=device)
    for directions in (("query_to_doc",), CLIP):
        expected, found = (
            matryoshka_contrastive_loss_with_stats(queries, docs, dims=WEIGHTS, directions=directions, backend=name)[0]
            for name in ("reference", "triton")
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (32, 128), (33, 257), (100, 63)])
def test_passes_of_the_norms(rows: int, columns: int, device: torch.device, poisoned_empty: None) -> None:
    torch.manual_seed(0)
    left, right = torch.rand(rows, device=device), torch.rand(columns, device=device)
    # parts of wider blocks, as the matrices of several directions are
    product, grad = torch.randn(2, rows, columns + 9, device=device)[:, :, 5:-4]
    results = []
    for passes in (PrefixPasses(), TritonPrefixPasses()):
        out, given = torch.full((rows, columns + 3), 7.0, device=device), grad.clone()
        passes.cosines(product, left, right, out[:, :-3])
        results.append([out, *passes.answers(given, product, left, right), given])
    for found, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
