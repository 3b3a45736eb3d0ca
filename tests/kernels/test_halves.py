"""Float32 in halves: what the two of them keep, when they are taken, and losses by them against float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tileloss import Guide
from tileloss.backend import interpreting
from tileloss.functional import contrastive_loss, matryoshka_contrastive_loss
from tileloss.kernels import halves
from tileloss.spec import DIRECTIONS
from tileloss.tiled.halves import LOW_SCALE

CLIP = ("query_to_doc", "doc_to_query")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "default": {},
    "rows at hand, hardness": {"directions": (*CLIP[:1], *DIRECTIONS[1:2]), "hardness": ("all_negatives", 2.0)},
    "clip": {"directions": CLIP, "partition": "per_direction"},
    "four directions": {"directions": DIRECTIONS},
    "another floor": {"similarity": "torch_cosine"},
}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves whatever the size, on whatever device runs the kernels."""
    monkeypatch.setattr(halves, "pays", lambda *_: True)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 63), (2, 1500)])
def test_the_halves_keep_22_bits(rows: int, columns: int, device: torch.device, poisoned_empty: None) -> None:
    torch.manual_seed(0)
    x = torch.rand(rows, 2 * columns, device=device)[:, :columns].mul_(2.0**14)  # rows of another stride
    x[0, 0] = 2.0**14 * 1e-12
    high, low = halves.halves(x)
    assert high.dtype == low.dtype == torch.float16
    assert torch.equal(high, x.half())
    back = high.double() + low.double() / LOW_SCALE
    large = x > 1.0
    assert ((back - x).abs()[large] <= 2.0**-22 * x[large]).all()
    assert abs(back[0, 0] - x[0, 0]) < 1e-2 * x[0, 0], "a probability of 1e-12 is more than nothing"


def test_they_are_taken_where_it_pays(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    if device.type == "cuda":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert halves.pays(8192, 8192, 768, device)
    assert not halves.pays(4096, 4096, 768, device)
    assert not halves.pays(8192, 8192, 770, device), "rows that tensor cores cannot read at full speed"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert not halves.pays(8192, 8192, 768, device)


@pytest.mark.skipif(interpreting(), reason="in the interpreter any device will do")
def test_a_gpu_with_slow_tensor_cores_multiplies_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    assert not halves.pays(8192, 8192, 768, torch.device("cuda"))


def with_gradients(queries: Tensor, docs: Tensor, backend: str, **options: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (queries, docs)]
    scale = torch.tensor(20.0, dtype=queries.dtype, device=queries.device, requires_grad=True)
    loss = contrastive_loss(*leaves, scale=scale, backend=backend, **options)
    return [loss.detach(), *torch.autograd.grad(loss, (*leaves, scale))]


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_as_exact_as_eager(
    name: str, device: torch.device, always: None, small_blocks: None, poisoned_empty: None
) -> None:
    torch.manual_seed(0)
    queries, docs = torch.randn(100, 65, device=device), torch.randn(200, 65, device=device)
    docs[:100] += queries
    options = OBJECTIVES[name]
    found = with_gradients(queries, docs, "triton", **options)
    eager = with_gradients(queries, docs, "reference", **options)
    truth = with_gradients(queries.double(), docs.double(), "reference", **options)
    for place, (ours, theirs, exact) in enumerate(zip(found, eager, truth, strict=True)):
        assert error(ours, exact) <= 3 * error(theirs, exact) + (1e-4 if place else 1e-5)
        assert error(ours, exact) < 1e-5, "this is not what float16 or TF32 could do"
    again = with_gradients(queries, docs, "triton", **options)
    assert all(map(torch.equal, found, again)), "two runs must give the same bits"


def test_a_guide_rules_out_the_same_pairs(device: torch.device, always: None, small_blocks: None) -> None:
    torch.manual_seed(0)
    queries, docs, texts = (torch.randn(n, 33, device=device) for n in (80, 80, 160))
    options = {"exclude": Guide(*texts.split(80), margin=0.1), "directions": ("query_to_doc", *DIRECTIONS[1:2])}
    found = with_gradients(queries, docs, "triton", **options)
    doubled = {**options, "exclude": Guide(*texts.double().split(80), margin=0.1)}
    truth = with_gradients(queries.double(), docs.double(), "reference", **doubled)
    assert all(error(ours, exact) < 3e-6 for ours, exact in zip(found, truth, strict=True))


def test_prefixes_come_one_by_one(device: torch.device, always: None, small_blocks: None) -> None:
    torch.manual_seed(0)
    queries, docs = torch.randn(2, 70, 48, device=device)
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        leaves = [x.to(dtype).requires_grad_() for x in (queries, docs)]
        loss = matryoshka_contrastive_loss(*leaves, dims=[48, 12], backend=backend)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(error(ours, exact) < 3e-6 for ours, exact in zip(*results, strict=True))


def test_unit_rows_lose_nothing_that_a_cosine_has(device: torch.device, always: None) -> None:
    """Rows of thousands of numbers, most of whose low halves are smaller than any normal float16."""
    torch.manual_seed(0)
    queries, docs = torch.randn(2, 40, 3000, device=device)
    exact = F.normalize(queries.double()) @ F.normalize(docs.double()).T
    truth = F.cross_entropy(20.0 * exact, torch.arange(40, device=device))
    loss = contrastive_loss(queries, docs, scale=20.0, backend="triton")
    assert abs(loss.double() - truth) < 1e-6 * truth
