"""Hardest negatives: over every backend the definition's values, indices and gradients, no less exact."""

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tileloss
from tileloss.errors import BackendError, DeviceError, DtypeError, FallbackWarning, InputError, ShapeError
from tileloss.functional import HardestNegatives, hardest_negatives
from tileloss.reference.hardest import hardest_negatives as definition
from tileloss.similarity import cos_sim, dot_score, euclidean_sim

hardest_module = importlib.import_module("tileloss.functional.hardest")

SHAPES = [(1, 1), (1, 5), (2, 2), (63, 63), (100, 257), (257, 257)]
WIDTHS = (1, 3, 65)
PRODUCTS = ("cosine", "torch_cosine", "dot")


def batch(size: int, count: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(size, width).to(dtype), torch.randn(count, width).to(dtype)


def weighted(found: HardestNegatives, weights: Tensor) -> Tensor:
    """A number that depends on all similarities; minus infinity is clipped, as a hinge would."""
    return (weights[0] * found.similarity.clamp_min(-1e3) + weights[1] * found.positive_similarity).sum()


def all_of(queries: Tensor, docs: Tensor, similarity: Any, backend: str) -> list[Tensor]:
    """Similarities, indices, and the gradients of a weighted sum."""
    leaves = [x.clone().requires_grad_() for x in (queries, docs)]
    found = hardest_negatives(*leaves, similarity=similarity, backend=backend)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, len(queries), generator=generator, dtype=torch.float64).to(found.similarity.dtype)
    gradients = torch.autograd.grad(weighted(found, weights), leaves)
    return [found.similarity.detach(), found.positive_similarity.detach(), *gradients, found.index]


@pytest.mark.parametrize("similarity", PRODUCTS)
@pytest.mark.parametrize(("size", "count"), SHAPES)
def test_blocks_agree_with_the_definition(size: int, count: int, similarity: str, small_blocks: int) -> None:
    for width in WIDTHS[similarity != "dot" :]:  # the cosine of numbers is a sign, with ties alone
        inputs = batch(size, count, width)
        found, expected = (all_of(*inputs, similarity, name) for name in ("tiled", "reference"))
        assert torch.equal(found[-1], expected[-1])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("similarity", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_eager(dtype: torch.dtype, similarity: str, small_blocks: int) -> None:
    for (size, count), width in itertools.product(SHAPES[2:], WIDTHS[1:]):
        inputs = batch(size, count, width, dtype)
        truth = all_of(*(x.double() for x in inputs), similarity, "reference")
        eager, found = (all_of(*inputs, similarity, name) for name in ("reference", "tiled"))
        assert [x.dtype for x in found] == [torch.float32, torch.float32, dtype, dtype, torch.int64]
        for part, slack in enumerate((1e-5, 1e-5, 1e-4, 1e-4)):
            errors = [((x[part].double() - truth[part]).norm() / truth[part].norm()).item() for x in (found, eager)]
            assert errors[0] <= 3 * errors[1] + slack, (part, size, count, width)


def test_strides_do_not_matter(backend: str) -> None:
    queries, docs = batch(20, 30, 8)
    expected = all_of(queries[:, ::2], docs[:, ::2], "cosine", backend)
    for a, b in zip(all_of(queries[:, ::2].T.contiguous().T, docs[:, ::2].contiguous(), "cosine", backend), expected,
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    row = torch.randn(1, 8, dtype=torch.float64)
    for a, b in zip(all_of(row.expand(9, 8), docs, "dot", backend), all_of(row.repeat(9, 1), docs, "dot", backend),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_one_gradient_is_wanted(backend: str) -> None:
    for wanted in (0, 1):
        leaves = [x.requires_grad_(place == wanted) for place, x in enumerate(batch(20, 30, 8))]
        both = all_of(*(x.detach() for x in leaves), "cosine", backend)
        found = hardest_negatives(*leaves)
        weights = torch.randn(2, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (gradient,) = torch.autograd.grad(weighted(found, weights), leaves[wanted])
        torch.testing.assert_close(gradient, both[2 + wanted], rtol=1e-12, atol=1e-12)


def test_queries_may_be_the_docs(backend: str) -> None:
    """Nearest neighbours within one set: both gradients go to it."""
    x = batch(40, 1, 5)[0].requires_grad_()
    found = hardest_negatives(x, x)
    (gradient,) = torch.autograd.grad(found.similarity.sum(), x)
    similarities = F.normalize(x) @ F.normalize(x).T
    expected = (similarities - 4 * torch.eye(40, dtype=torch.float64)).amax(dim=1)
    torch.testing.assert_close(found.similarity, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-9, atol=1e-12)


def test_ties_send_the_gradient_to_the_first(backend: str) -> None:
    queries, docs = torch.ones(5, 3, dtype=torch.float64), torch.ones(20, 3, dtype=torch.float64)
    docs[7:] = 2.0
    docs[10].requires_grad_(False)
    docs = docs.requires_grad_()
    found = hardest_negatives(queries, docs, similarity="dot")
    assert found.index.tolist() == [7] * 5
    (gradient,) = torch.autograd.grad(found.similarity.sum(), docs)
    assert gradient[7].tolist() == [5.0] * 3
    assert gradient.sum() == 15.0


def test_a_lone_pair_has_no_negative(backend: str) -> None:
    queries, docs = (x.requires_grad_() for x in batch(1, 1, 4))
    found = hardest_negatives(queries, docs)
    assert found.similarity.item() == float("-inf")
    assert found.index.item() == -1
    found.similarity.sum().backward()
    assert queries.grad is not None
    assert docs.grad is not None
    assert not queries.grad.any()
    assert not docs.grad.any()


def test_what_is_infinitely_far_is_no_negative(backend: str) -> None:
    queries, docs = batch(9, 12, 1)
    queries[1] = float("-inf")
    queries.requires_grad_()
    found = hardest_negatives(queries, docs.abs(), similarity="dot")
    assert found.similarity[1].item() == float("-inf")
    assert [row for row, index in enumerate(found.index) if index == -1] == [1]
    (gradient,) = torch.autograd.grad(found.similarity[1], queries)
    assert not gradient.any()


def test_an_empty_batch(backend: str) -> None:
    for count in (0, 3):
        found = hardest_negatives(torch.randn(0, 4), torch.randn(count, 4))
        assert [len(x) for x in found] == [0, 0, 0]
        assert found.index.dtype == torch.int64


def test_embeddings_of_no_width_are_all_alike(backend: str) -> None:
    found = hardest_negatives(torch.empty(9, 0), torch.empty(9, 0))
    assert found.similarity.tolist() == [0.0] * 9
    assert found.index.tolist() == [1, *[0] * 8]


def test_zero_rows_have_the_clamped_gradient(backend: str) -> None:
    queries, docs = batch(9, 9, 5)
    queries[3], docs[4], queries[5] = 0.0, 0.0, queries[5] * 1e-14
    for similarity in ("cosine", "torch_cosine"):
        found, expected = (all_of(queries, docs, similarity, name) for name in (backend, "reference"))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_nan_is_seen(backend: str) -> None:
    queries, docs = batch(9, 9, 5)
    docs[4, 0] = float("nan")
    found = hardest_negatives(queries, docs)
    assert found.similarity.isnan().sum() == 8
    assert found.positive_similarity[4].isnan()


def test_small_batches_take_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 128 x 128 on a CPU, for blocks without a GEMM on the way back pay early."""
    called = []
    monkeypatch.setattr(
        hardest_module, "block_hardest", lambda *inputs: called.append(inputs) or definition(*inputs[:3])
    )
    for size, blocks in ((64, 0), (128, 0), (129, 1)):
        hardest_negatives(*batch(size, size, 5))
        assert len(called) == blocks


def test_two_runs_give_the_same_bits() -> None:
    inputs = batch(500, 700, 33, torch.float32)
    first, second = (all_of(*inputs, "cosine", "tiled") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_are_finite_differences(backend: str) -> None:
    queries, docs = (x.requires_grad_() for x in batch(9, 12, 4))
    torch.autograd.gradcheck(lambda q, d: hardest_negatives(q, d)[::2], (queries, docs))
    torch.autograd.gradgradcheck(lambda q, d: hardest_negatives(q, d)[::2], (queries[:4], docs[:5]))
    torch.autograd.gradgradcheck(lambda q: hardest_negatives(q, docs.detach()).similarity, (queries,))


def test_gradients_under_create_graph_are_the_same(backend: str) -> None:
    queries, docs = (x.requires_grad_() for x in batch(9, 12, 4))
    found = hardest_negatives(queries, docs)
    plain = torch.autograd.grad(found.similarity.sum(), (queries, docs), retain_graph=True)
    graphed = torch.autograd.grad(found.similarity.sum(), (queries, docs), create_graph=True)
    for a, b in zip(graphed, plain, strict=True):
        assert a.requires_grad
        torch.testing.assert_close(a.detach(), b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("related", [lambda x: x, lambda x: 2 * x.flip(1) + x, lambda x: x.detach()])
def test_second_derivative_of_inputs_that_share_a_source(related: Callable[[Tensor], Tensor], backend: str) -> None:
    """The gradient of docs that were computed from queries reaches the queries once."""

    def derivatives(name: str) -> tuple[Tensor, Tensor]:
        queries = batch(9, 1, 4)[0].requires_grad_()
        found = hardest_negatives(queries, related(queries), backend=name)
        total = (found.similarity - found.positive_similarity).sum()
        (first,) = torch.autograd.grad(total, queries, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), queries)
        return first, second

    for a, b in zip(derivatives(backend), derivatives("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backward_too", [False, True])
def test_autocast_changes_nothing(backward_too: bool, backend: str) -> None:
    if backward_too and backend == "reference":
        pytest.skip("the backward of a GEMM is autograd's own, and narrowed where the caller runs it under autocast")
    leaves = [x.requires_grad_() for x in batch(20, 30, 8, torch.float32)]
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = hardest_negatives(*leaves)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled and backward_too):
            gradients = torch.autograd.grad(found.similarity.sum() - found.positive_similarity.sum(), leaves)
        results.append([*found, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_gradient_is_wanted(backend: str) -> None:
    queries, docs = (x.requires_grad_() for x in batch(20, 30, 8))
    with torch.no_grad():
        found = hardest_negatives(queries, docs)
    assert not any(x.requires_grad for x in found)
    assert not hardest_negatives(queries, docs).index.requires_grad


def shifted(a: Tensor, b: Tensor) -> Tensor:
    return cos_sim(a, b) + a[:, :1].tanh()


@pytest.mark.parametrize("similarity", ["euclidean", "manhattan", shifted])
def test_other_similarities_are_materialised_and_said_so(similarity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch(300, 300, 5)
    monkeypatch.setattr(tileloss.backend, "_said", set())
    with pytest.warns(FallbackWarning, match="have no block algorithm"):
        found = all_of(*inputs, similarity, "auto")
    for a, b in zip(found, all_of(*inputs, similarity, "reference"), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(BackendError, match="only those by 'cosine' and 'dot'"):
        hardest_negatives(*inputs, similarity=similarity, backend="tiled")


def test_stock_functions_are_recognised() -> None:
    inputs = batch(20, 30, 8)
    for function, name in ((cos_sim, "cosine"), (dot_score, "dot")):
        found, expected = (hardest_negatives(*inputs, similarity=s, backend="tiled") for s in (function, name))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(BackendError):
        hardest_negatives(*inputs, similarity=euclidean_sim, backend="tiled")


def test_sparse_inputs_are_made_dense(backend: str) -> None:
    queries, docs = batch(9, 12, 4)
    found = hardest_negatives(queries.to_sparse(), docs)
    for a, b in zip(found, hardest_negatives(queries, docs), strict=True):
        assert torch.equal(a, b)


WRONG: list[tuple[type[Exception], tuple[Any, Any], dict[str, Any], str]] = [
    (ShapeError, (torch.randn(4, 3), torch.randn(8, 5)), {}, "queries have width 3 and docs 5"),
    (ShapeError, (torch.randn(4, 3), torch.randn(3, 3)), {}, "There are 4 queries and only 3 docs"),
    (ShapeError, (torch.randn(4), torch.randn(4, 3)), {}, "queries must be a matrix of embeddings"),
    (DtypeError, (torch.randn(4, 3), torch.ones(4, 3).long()), {}, "docs must hold floating-point numbers"),
    (DtypeError, (torch.randn(4, 3).double(), torch.randn(4, 3)), {}, "queries are torch.float64"),
    (DeviceError, (torch.randn(4, 3), torch.empty(4, 3, device="meta")), {}, "move both to one device"),
    (InputError, ([[1.0]], torch.randn(4, 3)), {}, "queries must be a tensor, got list"),
    (InputError, (torch.randn(4, 3), torch.randn(4, 3)), {"similarity": "angle"}, "similarity must be one of"),
    (InputError, (torch.randn(4, 3), torch.randn(4, 3)), {"backend": "cuda"}, "must be 'auto' or one of"),
]


@pytest.mark.parametrize(("kind", "inputs", "options", "message"), WRONG, ids=[m for *_, m in WRONG])
def test_bad_input(kind: type[Exception], inputs: tuple[Any, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(kind, match=message):
        hardest_negatives(*inputs, **options)
