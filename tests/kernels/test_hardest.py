"""The maximum of each row of a block and its first place; and the whole of the triton backend against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tileloss.functional import hardest_negatives
from tileloss.kernels import unit_rows
from tileloss.kernels.hardest import TritonHardest

EAGER = {
    "cosine": lambda a, b: F.normalize(a, dim=1) @ F.normalize(b, dim=1).T,
    "torch_cosine": lambda a, b: F.normalize(a, dim=1, eps=1e-8) @ F.normalize(b, dim=1, eps=1e-8).T,
    "dot": lambda a, b: a @ b.T,
}
SLACK = {"hardest": 1e-5, "own": 1e-5, "queries": 1e-4, "docs": 1e-4}


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


def batch(size: int, count: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each query with one document of its own and one that is clearly the nearest other, where there are two."""
    queries, docs = torch.randn(size, width), 0.2 * torch.randn(count, width)
    docs[:size] += queries
    if size > 1:
        docs[:size] += 0.8 * queries.roll(1, 0)
    return queries.to(device, dtype), docs.to(device, dtype)


def all_of(queries: Tensor, docs: Tensor, similarity: object, backend: str) -> tuple[dict[str, Tensor], Tensor]:
    leaves = [x.detach().requires_grad_() for x in (queries, docs)]
    found = hardest_negatives(*leaves, similarity=similarity, backend=backend)  # type: ignore[arg-type]
    weights = torch.linspace(0.5, 1.5, len(queries), device=queries.device)
    loss = (weights * (found.similarity.clamp_min(-9.0) - found.positive_similarity)).sum()
    parts = found.similarity.detach(), found.positive_similarity.detach(), *torch.autograd.grad(loss, leaves)
    return dict(zip(SLACK, parts, strict=True)), found.index


@pytest.mark.usefixtures("small_blocks", "poisoned_empty")
@pytest.mark.parametrize(
    ("similarity", "dtype"),
    [("cosine", torch.float32), ("cosine", torch.float16), ("torch_cosine", torch.float32), ("dot", torch.float16)],
)
@pytest.mark.parametrize(("size", "count", "width"), [(1, 1, 3), (1, 5, 3), (2, 2, 65), (63, 63, 65), (100, 157, 33)])
def test_as_exact_as_eager(
    size: int, count: int, width: int, dtype: torch.dtype, similarity: str, device: torch.device
) -> None:
    """An error of at most three times that of a formula that computes in the dtype throughout, plus a little."""
    torch.manual_seed(0)
    allowed = dict.fromkeys(SLACK, 0.0)
    for _ in range(3):
        inputs = batch(size, count, width, dtype, device)
        truth, index = all_of(*(x.double() for x in inputs), similarity, "reference")
        eager, _ = all_of(*inputs, EAGER[similarity], "reference")
        for part, exact in truth.items():
            error = (eager[part].double() - exact).norm() / exact.norm().clamp_min(1e-12)
            allowed[part] = max(allowed[part], error.nan_to_num().item())
    found, ours = all_of(*inputs, similarity, "triton")
    assert torch.equal(ours, index)
    assert [x.dtype for x in found.values()] == [torch.float32, torch.float32, dtype, dtype]
    for part, slack in SLACK.items():
        finite = truth[part].isfinite()
        assert torch.equal(found[part][~finite].double(), truth[part][~finite])
        error = (found[part].double() - truth[part])[finite].norm()
        assert error <= (3 * allowed[part] + slack) * truth[part][finite].norm() + 1e-7, part


@pytest.mark.usefixtures("small_blocks")
def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    inputs = batch(100, 157, 33, torch.float32, device)
    (first, index), (second, again) = (all_of(*inputs, "cosine", "triton") for _ in range(2))
    assert torch.equal(index, again)
    assert all(torch.equal(first[part], second[part]) for part in SLACK)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_inputs_of_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
    queries, docs = batch(40, 50, 33, torch.float16, device)
    queries, docs = queries.to(dtypes[0]), docs.to(dtypes[1])
    found, _ = all_of(queries, docs, "cosine", "triton")
    truth, _ = all_of(queries.double(), docs.double(), "cosine", "reference")
    assert [found[part].dtype for part in ("queries", "docs")] == list(dtypes)
    for part, exact in truth.items():
        assert (found[part].double() - exact).norm() <= 1e-3 * exact.norm(), part
