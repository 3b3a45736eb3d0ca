"""The walks over row blocks against the definition: numbers, gradients, and how much work they do."""

import importlib
import itertools

import pytest
import torch
from torch import Tensor

from tileloss import reference, rowwise, tiled
from tileloss.similarity import SimilarityFn, euclidean_sim, ready_dtype
from tileloss.spec import DIRECTIONS, ContrastiveSpec
from tileloss.tiled import Needs, Result

ALL = Needs(True, True, True)
NONE = Needs(False, False, False)

BLOCKS = [DIRECTIONS[:1] + more for n in range(4) for more in itertools.combinations(DIRECTIONS[1:], n)]
OBJECTIVES = [(directions, "joint") for directions in BLOCKS] + [
    (("query_to_doc",), "per_direction"),
    (("query_to_doc", "doc_to_query"), "per_direction"),
]
HARDNESS = [(None, 0.0), ("in_batch_negatives", 3.0), ("hard_negatives", 3.0), ("all_negatives", 2.0)]


@rowwise
def asymmetric(a: Tensor, b: Tensor) -> Tensor:
    """Neither symmetric nor homogeneous: what is true of the four stock similarities does not hold."""
    return (a @ b.T).tanh() + 0.3 * a[:, :1] - 0.1 * b[:, -1:].T ** 2


SIMILARITIES: list[str | SimilarityFn] = ["cosine", "dot", "euclidean", "manhattan", asymmetric]


def by_definition(
    queries: Tensor, docs: Tensor, scale: float, spec: ContrastiveSpec, ids: Tensor | None, mask: Tensor | None
) -> Result:
    q, d = queries.clone().requires_grad_(), docs.clone().requires_grad_()
    s = torch.tensor(scale, dtype=torch.double, requires_grad=True)
    loss, seen = reference.contrastive_loss(q, d, s, spec, ids, mask)
    return Result(loss.detach(), seen.statistics(), *torch.autograd.grad(loss, (q, d, s)))


def assert_same(found: Result, expected: Result, about: object) -> None:
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-11, abs=1e-12), about
    torch.testing.assert_close(found.stats, expected.stats, rtol=1e-6, atol=1e-6, msg=lambda m: f"{about}: {m}")
    for name in ("d_queries", "d_docs", "d_scale"):
        error = (getattr(found, name) - getattr(expected, name)).norm()
        assert error <= 1e-10 * getattr(expected, name).norm() + 1e-12, (name, about)


def exclusions(kind: str, size: int, count: int) -> tuple[Tensor | None, Tensor | None]:
    ids = torch.arange(count) % size // 3 if "ids" in kind else None
    if kind == "free ids":  # own hard negatives that carry another query's id
        ids = torch.cat([torch.arange(size), torch.randint(size, (count - size,))])
    mask = torch.rand(size, count) < 0.3 if "mask" in kind else None
    return ids, mask


@pytest.mark.parametrize("kind", ["nothing", "ids", "free ids", "mask", "ids and mask"])
@pytest.mark.parametrize(("directions", "partition"), OBJECTIVES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_walks_equal_the_definition(
    similarity: str | SimilarityFn,
    directions: tuple[str, ...],
    partition: str,
    kind: str,
    small_blocks: int,
    poisoned_empty: None,
) -> None:
    torch.manual_seed(0)
    for (mode, strength), (size, columns) in zip(HARDNESS, ((15, 1), (20, 2), (9, 3), (7, 2)), strict=True):
        spec = ContrastiveSpec(similarity, directions, partition, mode, strength)
        queries, docs = torch.randn(size, 5).double(), torch.randn(columns * size, 5).double()
        ids, mask = exclusions(kind, size, len(docs))
        found = tiled.contrastive_loss(queries, docs, 2.5, spec, ids, mask, ALL)
        assert_same(found, by_definition(queries, docs, 2.5, spec, ids, mask), (mode, size, columns))


@pytest.mark.parametrize(("size", "count"), [(1, 1), (1, 5), (2, 2), (8, 8), (14, 17), (5, 41), (63, 63)])
@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", "query_to_query", "doc_to_query")])
@pytest.mark.parametrize("width", [1, 3, 65])
def test_any_size(size: int, count: int, width: int, directions: tuple[str, ...], small_blocks: int) -> None:
    torch.manual_seed(0)
    spec = ContrastiveSpec("cosine", directions)
    queries, docs = torch.randn(size, width).double(), torch.randn(count, width).double()
    ids = torch.randint(size, (count,))
    for doc_ids in (None, ids):
        found = tiled.contrastive_loss(queries, docs, 5.0, spec, doc_ids, None, ALL)
        assert_same(found, by_definition(queries, docs, 5.0, spec, doc_ids, None), doc_ids is None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(
    "directions",
    [("query_to_doc",), ("query_to_doc", "query_to_query"), ("query_to_doc", "doc_to_query"), DIRECTIONS],
)
def test_a_gradient_does_not_depend_on_which_others_are_wanted(
    directions: tuple[str, ...], similarity: str | SimilarityFn, dtype: torch.dtype, small_blocks: int
) -> None:
    torch.manual_seed(0)
    spec = ContrastiveSpec(similarity, directions)
    queries, docs = torch.randn(16, 5).to(dtype), torch.randn(32, 5).to(dtype)
    whole = tiled.contrastive_loss(queries, docs, 1.0, spec, None, None, ALL)
    close = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    for wanted in itertools.product((False, True), repeat=3):
        part = tiled.contrastive_loss(queries, docs, 1.0, spec, None, None, Needs(*wanted))
        torch.testing.assert_close(part.loss, whole.loss, **close)
        for need, found, expected in zip(wanted, part[2:], whole[2:], strict=True):
            assert (found is not None) == need
            if need:
                torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", "doc_to_query"), DIRECTIONS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_have_the_gradients_of_the_same_numbers_in_float32(
    dtype: torch.dtype,
    directions: tuple[str, ...],
    similarity: str | SimilarityFn,
    small_blocks: int,
    poisoned_empty: None,
) -> None:
    """Rounded once, at the end: sums in float32, whichever of them are finished block by block."""
    torch.manual_seed(0)
    queries, docs = torch.randn(20, 5).to(dtype), torch.randn(40, 5).to(dtype)
    spec = ContrastiveSpec(similarity, directions)
    narrow = tiled.contrastive_loss(queries, docs, 1.0, spec, None, None, ALL)
    wide = tiled.contrastive_loss(queries.float(), docs.float(), 1.0, spec, None, None, ALL)
    torch.testing.assert_close((narrow.loss, narrow.d_scale), (wide.loss, wide.d_scale), rtol=1e-5, atol=1e-6)
    for found, expected in zip(narrow[2:4], wide[2:4], strict=True):
        assert found is not None
        assert expected is not None
        assert found.dtype == ready_dtype(dtype)
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(found.float(), expected, rtol=unit, atol=1e-3 * unit)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_the_size_of_a_block_changes_nothing(similarity: str | SimilarityFn, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    blocks = importlib.import_module("tileloss.tiled.blocks")
    spec = ContrastiveSpec(similarity, DIRECTIONS, hardness="all_negatives", hardness_strength=2.0)
    queries, docs = torch.randn(23, 5).double(), torch.randn(46, 5).double()
    whole = tiled.contrastive_loss(queries, docs, 3.0, spec, None, None, ALL)
    monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", 1)
    for rows in (1, 2, 22, 23):
        monkeypatch.setitem(blocks.MIN_ROWS, "cpu", rows)
        parts = tiled.contrastive_loss(queries, docs, 3.0, spec, None, None, ALL)
        for found, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


class Work:
    """Multiplications done in GEMMs, in units of one product of all queries with all docs."""

    def __init__(self) -> None:
        self.units = 0.0

    def spy_on(self, monkeypatch: pytest.MonkeyPatch, unit: int) -> None:
        module = importlib.import_module("tileloss.tiled.similarity")
        for name in ("multiply", "accumulate"):
            monkeypatch.setattr(module, name, self._counting(getattr(module, name), name, unit))

    def _counting(self, gemm, name: str, unit: int):  # type: ignore[no-untyped-def]
        def counted(*args: Tensor, **kwargs: Tensor) -> Tensor:
            left, right = args[:2] if name == "multiply" else args[1:3]
            self.units += left.shape[0] * left.shape[1] * right.shape[1] / unit
            return gemm(*args, **kwargs)

        return counted


QUERIES, DOCS, SCALE = Needs(True, False, False), Needs(False, True, False), Needs(False, False, True)
SYMMETRIC = ("query_to_doc", "doc_to_query")


@pytest.mark.parametrize(
    ("directions", "partition", "needs", "gemms"),
    [
        (("query_to_doc",), "joint", ALL, 3),
        (("query_to_doc",), "joint", NONE, 1),
        (("query_to_doc",), "joint", QUERIES, 2),
        (("query_to_doc",), "joint", DOCS, 2),
        (("query_to_doc",), "joint", SCALE, 3),
        (("query_to_doc", "query_to_query"), "joint", ALL, 6),
        (SYMMETRIC, "per_direction", ALL, 4),
        (SYMMETRIC, "joint", ALL, 4),
        (SYMMETRIC, "joint", NONE, 1),
        (SYMMETRIC, "joint", QUERIES, 3),
        # the two symmetric matrices are walked over their upper triangles
        (DIRECTIONS, "joint", ALL, 4 + 2 + 2),
        (DIRECTIONS, "joint", NONE, 2),
    ],
)
def test_no_gemm_more_than_stated(
    directions: tuple[str, ...],
    partition: str,
    needs: Needs,
    gemms: float,
    small_blocks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = 60 * small_blocks
    queries, docs = torch.randn(size, 4), torch.randn(size, 4)
    work = Work()
    work.spy_on(monkeypatch, size * size * 4)
    tiled.contrastive_loss(queries, docs, 5.0, ContrastiveSpec("dot", directions, partition), None, None, needs)
    # the blocks on a triangle's diagonal are done whole: one part in sixty
    assert gemms <= work.units + 1e-9
    assert work.units == pytest.approx(gemms, rel=0.02 if "query_to_query" in directions else 1e-9)


@pytest.mark.parametrize(("directions", "gemms"), [(SYMMETRIC, 3), (DIRECTIONS, 9)])
@pytest.mark.parametrize(("room", "repeated"), [(1, False), (0, True)])  # of a batch whose matrices fill a block
def test_similarities_that_fit_a_block_are_computed_once(
    directions: tuple[str, ...], gemms: int, room: int, repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, matrices = 64, len(directions) - 1  # doc_to_query has none of its own
    blocks = importlib.import_module("tileloss.tiled.blocks")
    held = matrices + tiled.Passes.blocks_held
    monkeypatch.setitem(blocks.MIN_ROWS, "cpu", 1)
    monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", held * size * size * 4 - 1 + room)
    work = Work()
    work.spy_on(monkeypatch, size * size * 4)
    queries, docs = torch.randn(size, 4), torch.randn(size, 4)
    tiled.contrastive_loss(queries, docs, 5.0, ContrastiveSpec("dot", directions), None, None, ALL)
    assert work.units == gemms + (matrices if repeated else 0)


def test_small_probabilities_are_not_skipped(small_blocks: int) -> None:
    """A thousand negatives, none above a probability of 2 ** -12 as a rule, together make up the gradient."""
    torch.manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(1000, 16))
    spec = ContrastiveSpec("dot")
    found = tiled.contrastive_loss(queries, queries.clone(), 20.0, spec, None, None, ALL)
    expected = by_definition(queries.double(), queries.double(), 20.0, spec, None, None)
    assert found.d_queries is not None
    assert expected.d_queries is not None
    assert (found.d_queries - expected.d_queries).norm() < 1e-4 * expected.d_queries.norm()


def test_distance_zero_has_no_gradient(small_blocks: int) -> None:
    queries = torch.randn(9, 4).double()
    found = tiled.contrastive_loss(queries, queries.clone(), 1.0, ContrastiveSpec(euclidean_sim), None, None, ALL)
    expected = by_definition(queries, queries, 1.0, ContrastiveSpec("euclidean"), None, None)
    assert_same(found, expected, "identical columns")


def test_rows_below_the_norm_floor(small_blocks: int) -> None:
    """Below 1e-12 the norm is a constant: the gradient is that of x / 1e-12, not that of a unit vector."""
    queries, docs = torch.randn(9, 4).double(), torch.randn(9, 4).double()
    queries[2], queries[5] = 0.0, queries[5] * 1e-14
    docs[1], docs[7] = 0.0, docs[7] * 1e-13
    for directions in (("query_to_doc",), DIRECTIONS):
        spec = ContrastiveSpec("cosine", directions)
        found = tiled.contrastive_loss(queries, docs, 2.0, spec, None, None, ALL)
        expected = by_definition(queries, docs, 2.0, spec, None, None)
        for part, whole in zip(found[2:4], expected[2:4], strict=True):
            assert part is not None
            assert whole is not None
            relative = (part - whole).norm(dim=1) / whole.norm(dim=1)
            assert relative.max() < 1e-9
