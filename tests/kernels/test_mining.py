"""Mining in Triton: the passes against the PyTorch ones in float64, and the whole loss against the definition.

Embeddings of small whole numbers have distances without rounding, with equal ones and hinges of exactly zero among
them; there the passes must agree to the last bit. Elsewhere the rule of test_contrastive.py holds.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tileloss.backend import interpreting
from tileloss.functional import triplet_loss
from tileloss.kernels import mining as triton_mining
from tileloss.kernels.mining import TritonMining
from tileloss.tiled.mining import Classes, Mining, MiningProblem

CLASS_SIZES = [1, 2, 3, 17, 40]  # of which the last two take more than one group
LABELS = {
    "classes of many sizes": torch.repeat_interleave(torch.arange(5), torch.tensor(CLASS_SIZES)),
    "one class": torch.zeros(19, dtype=torch.int64),
    "no positives": torch.arange(19),
    "one row": torch.zeros(1, dtype=torch.int64),
    "two rows": torch.tensor([0, 1]),
}
MINING = ["all", "semi_hard", "hard"]
DISTANCES = ["euclidean", "squared_euclidean", "cosine"]
FOUND = {
    "all": ["total", "active", "hardest_positive", "hardest_negative"],
    "semi_hard": ["total", "active", "hardest_positive", "hardest_negative"],
    "hard": ["hardest_positive", "hardest_negative", "positive_index", "negative", "negative_index"],
}


@pytest.fixture(autouse=True)
def _narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_mining, "_WIDEST_ALL_BLOCK", 32)
    monkeypatch.setattr(triton_mining, "_WIDEST_SEMI_HARD_BLOCK", 32)
    monkeypatch.setattr(triton_mining, "_WIDEST_LONE_BLOCK", 32)


def shuffled(name: str, device: torch.device) -> Tensor:
    labels = LABELS[name]
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))].to(device)


def run(
    mining_class: type[Mining],
    x: Tensor,
    labels: Tensor,
    mining: str,
    distance: str,
    margin: float = 0.5,
    soft: bool = False,
    start: int = 0,
    gradients: bool = True,
) -> dict[str, Tensor]:
    """One pass over the rows from `start` on: what it finds for them, and the slopes."""
    problem = MiningProblem(len(x), Classes.from_labels(labels), distance, margin, soft)
    miner = mining_class(problem, x)
    rows = miner.distance.prepare(x).rows
    squares = None if distance == "cosine" else rows.to(miner.dtype).square().sum(dim=1)  # without a root that rounds
    block = torch.empty(len(x) - start, len(x), dtype=miner.dtype, device=x.device)
    wide = rows.to(miner.dtype)  # the same products whatever the operands
    miner.distance.products(wide[start:], wide, block)
    left = None if squares is None else squares[start:]
    slopes = None
    if mining == "hard":
        miner.hard(start, block, left, squares)
    else:
        slopes = (miner.all_triplets if mining == "all" else miner.semi_hard)(start, block, left, squares, gradients)
    if miner.pairs is not None:
        weights, partners = (kept[start:] for kept in miner.pairs)
        slopes = torch.zeros_like(block).scatter_add_(1, partners, weights)
    found = {name: getattr(miner, name)[start:].clone() for name in FOUND[mining]}
    return found if slopes is None else {**found, "slopes": slopes.clone()}


def error(found: Tensor, truth: Tensor) -> float:
    known = truth.isfinite()
    assert torch.equal(found[~known].double(), truth[~known].double())
    return ((found[known].double() - truth[known]).norm() / truth[known].double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("mining", MINING)
def test_as_the_passes_in_float64(
    mining: str, distance: str, soft: bool, device: torch.device, poisoned_empty: None
) -> None:
    torch.manual_seed(0)
    labels = shuffled("classes of many sizes", device)
    x = torch.randn(len(labels), 9, device=device)
    x[40] = x[50]
    options: dict[str, Any] = {"margin": 0.0 if soft else 0.5, "soft": soft, "start": 33}
    found = run(TritonMining, x, labels, mining, distance, **options)
    truth = run(Mining, x.double(), labels, mining, distance, **options)
    assert found.keys() == truth.keys()
    for part, ours in found.items():
        if ours.dtype == torch.int64:
            assert torch.equal(ours, truth[part]), part
        else:
            assert error(ours, truth[part]) < 3e-6, part


@pytest.mark.parametrize("margin", [0.0, 2.0])
@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("mining", MINING)
def test_to_the_last_bit_where_nothing_rounds(
    mining: str, name: str, margin: float, device: torch.device, poisoned_empty: None
) -> None:
    torch.manual_seed(0)
    labels = shuffled(name, device)
    x = torch.randint(0, 3, (len(labels), 4), device=device).float()
    found = run(TritonMining, x, labels, mining, "squared_euclidean", margin, start=len(x) // 2)
    truth = run(Mining, x.double(), labels, mining, "squared_euclidean", margin, start=len(x) // 2)
    for part, ours in found.items():
        assert torch.equal(ours.double(), truth[part].double()), part


@pytest.mark.parametrize("mining", ["all", "semi_hard"])
def test_narrow_slopes_are_the_wide_ones_rounded(mining: str, device: torch.device, poisoned_empty: None) -> None:
    """Though they overwrite the products that they come from. (The interpreter rounds towards zero.)"""
    labels = shuffled("classes of many sizes", device)
    x = torch.randn(len(labels), 9, device=device).bfloat16()
    narrow = run(TritonMining, x, labels, mining, "euclidean")
    wide = run(TritonMining, x.float(), labels, mining, "euclidean")
    assert narrow["slopes"].dtype == torch.bfloat16
    torch.testing.assert_close(narrow.pop("slopes").float(), wide["slopes"], rtol=2**-7, atol=0.0)
    for part, ours in narrow.items():
        assert torch.equal(ours, wide[part]), part


@pytest.mark.parametrize("mining", ["all", "semi_hard"])
def test_without_gradients_the_same_is_found(mining: str, device: torch.device, poisoned_empty: None) -> None:
    labels = shuffled("classes of many sizes", device)
    x = torch.randn(len(labels), 9, device=device)
    expected = run(TritonMining, x, labels, mining, "euclidean", start=40)
    found = run(TritonMining, x, labels, mining, "euclidean", start=40, gradients=False)
    assert "slopes" not in found
    for part, ours in found.items():
        assert torch.equal(ours, expected[part]), part


@pytest.mark.parametrize("mining", MINING)
def test_a_nan_is_seen(mining: str, device: torch.device) -> None:
    labels = shuffled("classes of many sizes", device)
    x = torch.randn(len(labels), 9, device=device)
    x[50, 3] = float("nan")
    assert triplet_loss(x, labels, mining=mining, backend="triton").isnan()


def in_dtype(x: Tensor, distance: str) -> Tensor:
    """The distance matrix as PyTorch would compute it in the dtype of `x` throughout."""
    if distance == "cosine":
        x = F.normalize(x, dim=1)
        return 1 - x @ x.T
    products = x @ x.T
    squares = products.diagonal()
    square = (squares[:, None] - 2 * products + squares).clamp_min(0)
    if distance == "squared_euclidean":
        return square
    return torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)


def inputs(size: int, width: int, each: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings around the centres of their classes, of `each` rows if it goes up."""
    torch.manual_seed(seed)
    labels = torch.randperm(size) // each
    return torch.randn(size, width)[labels] + 0.7 * torch.randn(size, width), labels - 3


def compute(x: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = triplet_loss(x, labels, **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


# the larger ones take the interpreter half a minute each
LARGE = [(70, 3, 30), (140, 3, 2)] if interpreting() else [(100, 3, 30), (257, 3, 2)]
SHAPES = [(2, 1, 1), (63, 65, 4), *LARGE]
CASES = [
    *((mining, "euclidean", 1.0, shape, torch.float32) for mining in MINING for shape in SHAPES),
    *((mining, "euclidean", 1.0, SHAPES[1], dtype) for mining in MINING for dtype in (torch.float16, torch.bfloat16)),
    *((mining, "cosine", 0.3, SHAPES[1], dtype) for mining in MINING for dtype in (torch.float32, torch.float16)),
    *((mining, "squared_euclidean", "soft", SHAPES[1], torch.float32) for mining in MINING),
]


@pytest.mark.parametrize(("mining", "distance", "margin", "shape", "dtype"), CASES, ids=str)
def test_as_exact_as_eager(
    mining: str, distance: str, margin: float | str, shape: tuple[int, int, int], dtype: torch.dtype,
    device: torch.device, small_blocks: None, poisoned_empty: None,
) -> None:  # fmt: skip
    options: dict[str, Any] = {"mining": mining, "margin": margin}
    eager = [0.0, 0.0]
    for seed in range(4):
        x, labels = (tensor.to(device) for tensor in inputs(*shape, seed))
        x = x.to(dtype)
        truth = compute(x.double(), labels, distance=distance, backend="reference", **options)
        plain = compute(x, labels, distance=lambda x: in_dtype(x, distance), backend="reference", **options)
        eager = [max(worst, error(a, b)) for worst, a, b in zip(eager, plain, truth, strict=True)]
    found = compute(x, labels, distance=distance, backend="triton", **options)
    assert found[1].dtype == dtype
    for part, ours, exact, allowed, slack in zip(("loss", "gradient"), found, truth, eager, (1e-5, 1e-4), strict=True):
        assert error(ours, exact) <= 3 * allowed + slack, part


@pytest.mark.parametrize("mining", MINING)
def test_two_runs_give_the_same_bits_and_strides_do_not_matter(
    mining: str, device: torch.device, small_blocks: None, poisoned_empty: None
) -> None:
    x, labels = (tensor.to(device) for tensor in inputs(66, 5, 20))
    strided = torch.zeros(5, 132, device=device).T[::2]
    strided.copy_(x)
    expected = compute(x, labels, mining=mining, backend="triton")
    for again in (x, strided):
        found = compute(again, labels[:, None], mining=mining, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_equal_rows_have_no_distance(device: torch.device) -> None:
    """Though the difference of squares says a little more or less."""
    x = torch.randn(20, 300, device=device).repeat(2, 1)
    labels = torch.arange(40, device=device) % 20
    found = run(TritonMining, x, labels, "hard", "euclidean")
    assert (found["hardest_positive"] == 0.0).all()
    assert torch.equal(found["positive_index"], torch.arange(40, device=device))


def test_the_first_of_equals(device: torch.device) -> None:
    """Of positives and of negatives that the same lane of a program meets, and of rows as far away as any."""
    x = torch.zeros(100, 1, device=device)
    x[[10, 42, 74]], x[[20, 52, 84]] = 3.0, 1.0
    labels = torch.zeros(100, dtype=torch.int64, device=device)
    labels[[20, 52, 84]] = 1
    found = run(TritonMining, x, labels, "hard", "squared_euclidean")
    assert found["positive_index"][0] == 10
    assert found["negative_index"][0] == 20
    # a positive, then the only negative, then the anchor; both of the former at the largest distance
    x, labels = torch.tensor([[1.0], [1.0], [0.0]], device=device), torch.tensor([0, 1, 0], device=device)
    assert run(TritonMining, x, labels, "hard", "squared_euclidean")["negative_index"][2] == 1
