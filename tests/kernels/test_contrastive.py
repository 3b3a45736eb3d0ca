"""The triton backend against the definition in float64, over everything that an objective can be.

Three copies of the inputs: the kernels and the materialised form in the dtype under test, and the materialised form in
float64, which counts as the truth. The rule: an error of at most three times the eager one's, plus 1e-5 on the loss
and 1e-4 on gradients, in relative norms. The eager form computes in the dtype throughout, as PyTorch would without the
library: for 16 bits that is what the kernels must beat, not match. Its error is the largest of a few draws, because
on a single one the roundings of a sum may happen to cancel.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tileloss import Guide
from tileloss.backend import interpreting
from tileloss.functional import contrastive_loss_with_stats
from tileloss.spec import DIRECTIONS

ROWS_AT_HAND = ("query_to_doc", "query_to_query", "doc_to_doc")
CLIP = ("query_to_doc", "doc_to_query")
SINGLE = [torch.float32]
HALF = (
    [torch.float16] if interpreting() else [torch.float16, torch.bfloat16]
)  # the interpreter's bfloat16 dot is wrong
EAGER = {
    "cosine": lambda a, b: F.normalize(a, dim=1) @ F.normalize(b, dim=1).T,
    "torch_cosine": lambda a, b: F.normalize(a, dim=1, eps=1e-8) @ F.normalize(b, dim=1, eps=1e-8).T,
    "dot": lambda a, b: a @ b.T,
    "euclidean": "euclidean",
    "manhattan": "manhattan",
}
SLACK = {"loss": 1e-5, "queries": 1e-4, "docs": 1e-4, "scale": 1e-4}


@dataclass
class Case:
    """An objective, the shapes of its inputs and the dtypes to try."""

    size: int
    count: int  # of documents
    width: int
    dtypes: list[torch.dtype]
    exclude: str = ""
    scale: float = 10.0
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Any]]:
        torch.manual_seed(seed)
        queries, docs = torch.randn(self.size, self.width), torch.randn(self.count, self.width)
        docs[: self.size] += queries  # positives that are near, so that rows are neither flat nor lost
        excluded = {
            "": lambda: None,
            "guide": lambda: torch.randn(self.size + self.count, 7),
            "ids": lambda: torch.randint(0, self.size // 2 + 1, (self.size,)),
            "ids of all docs": lambda: torch.randint(0, self.size // 2 + 1, (self.count,), dtype=torch.int32),
            "mask": lambda: torch.rand(self.size, self.count) < 0.3,
            "transposed mask": lambda: (torch.rand(self.count, self.size) < 0.3).T,
            "expanded mask": lambda: (torch.rand(self.count) < 0.3).expand(self.size, -1),
        }[self.exclude]()
        exclude = None if excluded is None else excluded.to(device)
        if self.exclude == "guide":
            exclude = Guide(*excluded.to(device).split([self.size, self.count]), margin=0.2)
        return queries.to(device, dtype), docs.to(device, dtype), {"exclude": exclude, **self.options}


def case(size: int, columns: int, width: int, dtypes: list[torch.dtype], exclude: str = "", **options: Any) -> Case:
    """A case with this many columns of documents, and settings of the objective."""
    scale = options.pop("scale", 10.0)
    count = options.pop("count", columns * size)
    return Case(size, count, width, dtypes, exclude, scale, options)


CASES = {
    "one row": case(1, 1, 3, SINGLE + HALF),
    "one row, four directions": case(1, 3, 3, SINGLE, directions=DIRECTIONS),
    "two rows, width one": case(2, 1, 1, SINGLE, similarity="dot", scale=1.0),
    "63 rows": case(63, 1, 65, SINGLE + HALF),
    "257 rows": case(257, 1, 3, SINGLE),
    "hard negatives": case(100, 3, 65, HALF),
    "uneven documents": case(63, 1, 3, SINGLE, "ids of all docs", count=100),
    "rows at hand": case(63, 2, 65, SINGLE + HALF, directions=ROWS_AT_HAND),
    "rows at hand, ids": case(63, 2, 3, SINGLE, "ids", directions=ROWS_AT_HAND),
    "rows at hand, mask, hardness": case(
        63, 2, 65, HALF, "mask", directions=ROWS_AT_HAND, hardness=("all_negatives", 2.0)
    ),
    "in-batch hardness, mask": case(63, 2, 65, SINGLE, "transposed mask", hardness=("in_batch_negatives", 5.0)),
    "hard-negative hardness, ids": case(100, 3, 3, SINGLE, "ids", hardness=("hard_negatives", 5.0)),
    "guide": case(63, 2, 65, SINGLE + HALF, "guide"),
    "guide, rows at hand": case(100, 2, 3, SINGLE + HALF, "guide", directions=ROWS_AT_HAND),
    "guide, hardness": case(63, 1, 65, SINGLE, "guide", similarity="torch_cosine", hardness=("all_negatives", 2.0)),
    "clip": case(63, 1, 65, SINGLE + HALF, directions=CLIP, partition="per_direction"),
    "clip, joint, uneven": case(100, 1, 3, SINGLE, "mask", count=163, directions=CLIP),
    "clip, hardness": case(100, 2, 3, HALF, "ids", directions=CLIP, hardness=("in_batch_negatives", 3.0)),
    "clip, own hardness": case(63, 2, 3, SINGLE, directions=CLIP, hardness=("hard_negatives", 3.0)),
    "clip, expanded mask": case(63, 2, 65, HALF, "expanded mask", directions=CLIP, partition="per_direction"),
    "four directions": case(100, 2, 65, SINGLE + HALF, directions=DIRECTIONS),
    "four directions, ids, hardness": case(
        63, 3, 3, SINGLE, "ids", directions=DIRECTIONS, hardness=("all_negatives", 2.0)
    ),
    "four directions, ids of all docs": case(63, 2, 65, HALF, "ids of all docs", directions=DIRECTIONS),
    "query_to_query beside clip": case(63, 1, 3, SINGLE, directions=(*CLIP, "query_to_query")),
    "dot": case(63, 2, 65, HALF, similarity="dot", scale=0.1),
    "euclidean": case(63, 2, 65, SINGLE + HALF, similarity="euclidean", scale=1.0),
    "euclidean, four directions": case(63, 1, 3, HALF, similarity="euclidean", scale=1.0, directions=DIRECTIONS),
    "manhattan, clip": case(63, 1, 3, SINGLE, similarity="manhattan", scale=1.0, directions=CLIP),
}


def compute(queries: Tensor, docs: Tensor, scale: float, options: dict[str, Any], backend: str) -> dict[str, Tensor]:
    q, d = queries.detach().requires_grad_(), docs.detach().requires_grad_()
    dtype = torch.promote_types(q.dtype, torch.float32)
    s = torch.tensor(scale, dtype=dtype, device=q.device, requires_grad=True)
    loss, stats = contrastive_loss_with_stats(q, d, scale=s, backend=backend, **options)
    found = (loss.detach(), *torch.autograd.grad(loss, (q, d, s)), torch.stack(list(stats)))
    return dict(zip((*SLACK, "stats"), found, strict=True))


def definition(queries: Tensor, docs: Tensor, scale: float, options: dict[str, Any]) -> dict[str, Tensor]:
    return compute(queries.double(), docs.double(), scale, options, "reference")


def eager_errors(about: Case, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """How far the formula is off when it is computed in `dtype` throughout."""
    worst = dict.fromkeys(SLACK, 0.0)
    for seed in range(4):
        queries, docs, options = about.inputs(dtype, device, seed)
        truth = definition(queries, docs, about.scale, options)
        similarity = EAGER[options.get("similarity", "cosine")]
        found = compute(queries, docs, about.scale, options | {"similarity": similarity}, "reference")
        worst = {part: max(worst[part], error(found[part], truth[part])) for part in SLACK}
    return worst


def error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, case in CASES.items() for dtype in case.dtypes], ids=str
)
def test_as_exact_as_eager(
    name: str, dtype: torch.dtype, device: torch.device, small_blocks: None, poisoned_empty: None
) -> None:
    about = CASES[name]
    queries, docs, options = about.inputs(dtype, device)
    found = compute(queries, docs, about.scale, options, "triton")
    truth = definition(queries, docs, about.scale, options)
    if (about.size, about.count) == (1, 1):  # nothing to learn: the loss and its gradients are zero
        for part in SLACK:
            assert found[part].abs().max() < 1e-5, part
        return
    torch.testing.assert_close(found["stats"], truth["stats"], rtol=2e-3 if dtype in HALF else 1e-5, atol=1e-6)
    for part, allowed in eager_errors(about, dtype, device).items():
        ours = error(found[part], truth[part])
        assert ours <= 3 * allowed + SLACK[part], f"{part}: {ours:.1e} against {allowed:.1e} eagerly"
    assert found["queries"].dtype == found["docs"].dtype == dtype


@pytest.mark.parametrize("directions", [ROWS_AT_HAND, DIRECTIONS])
def test_two_runs_give_the_same_bits(directions: tuple[str, ...], device: torch.device, small_blocks: None) -> None:
    queries, docs, _ = case(40, 2, 65, HALF).inputs(torch.float16, device)
    first, second = (compute(queries, docs, 20.0, {"directions": directions}, "triton") for _ in range(2))
    for part in first:
        assert torch.equal(first[part], second[part]), part


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides_do_not_matter(
    dtype: torch.dtype, device: torch.device, small_blocks: None, poisoned_empty: None
) -> None:
    queries, docs, _ = case(33, 2, 65, HALF).inputs(dtype, device)
    expected = compute(queries, docs, 20.0, {}, "triton")
    strided = torch.zeros(65, 66, dtype=dtype, device=device).T[::2]
    strided.copy_(queries)
    found = compute(strided, docs.T.contiguous().T, 20.0, {}, "triton")
    for part in expected:
        assert torch.equal(found[part], expected[part]), part


def test_expanded_inputs(device: torch.device, small_blocks: None) -> None:
    queries, docs, _ = case(33, 1, 65, HALF).inputs(torch.float32, device)
    one = docs[:1].expand(33, -1)
    found, expected = compute(queries, one, 20.0, {}, "triton"), compute(queries, one.clone(), 20.0, {}, "triton")
    for part in expected:
        assert torch.equal(found[part], expected[part]), part


def test_inputs_of_two_dtypes_are_computed_in_float32(device: torch.device, small_blocks: None) -> None:
    queries, docs, _ = case(33, 1, 65, HALF).inputs(torch.float16, device)
    found = compute(queries, docs.float(), 20.0, {}, "triton")
    expected = compute(queries.float(), docs.float(), 20.0, {}, "triton")
    assert torch.equal(found["loss"], expected["loss"])
    assert found["queries"].dtype == torch.float16
    assert found["docs"].dtype == torch.float32
    assert torch.equal(found["queries"], expected["queries"].half())
    assert torch.equal(found["docs"], expected["docs"])


@pytest.mark.parametrize("directions", [("query_to_doc",), CLIP])
def test_the_loss_needs_no_gradients(directions: tuple[str, ...], device: torch.device, small_blocks: None) -> None:
    queries, docs, _ = case(33, 1, 65, HALF).inputs(torch.float16, device)
    expected = compute(queries, docs, 20.0, {"directions": directions}, "triton")
    with torch.no_grad():
        loss, stats = contrastive_loss_with_stats(queries, docs, scale=20.0, directions=directions)
    assert torch.equal(loss, expected["loss"])
    assert torch.equal(torch.stack(list(stats)), expected["stats"])


@pytest.mark.parametrize("wanted", ["queries", "docs"])
def test_one_side_alone_gets_its_gradient(wanted: str, device: torch.device, small_blocks: None) -> None:
    queries, docs, _ = case(33, 1, 65, HALF).inputs(torch.float16, device)
    expected = compute(queries, docs, 20.0, {}, "triton")
    sides = {"queries": queries, "docs": docs}
    sides[wanted] = sides[wanted].detach().requires_grad_()
    contrastive_loss_with_stats(**sides, scale=20.0)[0].backward()
    assert torch.equal(sides[wanted].grad, expected[wanted])
