"""Bad input: the type that people catch, a message that says how to mend it, and no work before it."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tileloss import reference, tiled
from tileloss.errors import DeviceError, DtypeError, InputError, ShapeError
from tileloss.functional import contrastive_loss, contrastive_loss_with_stats

QUERIES, DOCS = torch.randn(4, 3), torch.randn(8, 3)


@pytest.fixture(autouse=True)
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be computed before the error."""

    def work(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("work was done before the error")

    for module in (reference, tiled):
        monkeypatch.setattr(module, "contrastive_loss", work)


def call(queries: Any = QUERIES, docs: Any = DOCS, **options: Any) -> Callable[[], Any]:
    return lambda: contrastive_loss(queries, docs, **options)


SHAPES = [
    (call(docs=torch.randn(8, 5)), "queries have width 3 and docs 5"),
    (call(docs=torch.randn(3, 3)), "There are 4 queries and only 3 docs"),
    (call(docs=torch.randn(3)), "docs must be a matrix of embeddings (rows, dimension), got shape (3,)"),
    (call(queries=torch.randn(4, 2, 3)), "queries must be a matrix"),
    (call(docs=torch.randn(7, 3), directions=("query_to_doc", "doc_to_doc")), "(7) must be a multiple"),
    (call(docs=torch.randn(7, 3), hardness=("all_negatives", 1.0)), "(7) must be a multiple"),
    (call(exclude=torch.zeros(4, 4, dtype=torch.bool)), "A boolean exclude must have shape (4, 8), got (4, 4)"),
    (call(exclude=torch.zeros(8, dtype=torch.bool)), "A boolean exclude must have shape (4, 8), got (8,)"),
    (call(exclude=torch.arange(5)), "one id for each of the 4 queries, or for each of the 8 docs"),
    (call(exclude=torch.zeros(4, 8, dtype=torch.long)), "one id for each"),
    (call(docs=torch.randn(7, 3), exclude=torch.arange(4)), "no multiple of 4"),
    (call(scale=torch.ones(2)), "scale must be a number or a tensor with one element, got shape (2,)"),
]
DTYPES = [
    (call(queries=QUERIES.double()), "queries are torch.float64 and docs torch.float32"),
    (call(docs=DOCS.long()), "docs must hold floating-point numbers, got torch.int64"),
    (call(queries=QUERIES.bool()), "queries must hold floating-point numbers"),
    (call(queries=QUERIES.cfloat()), "queries must hold floating-point numbers"),
    (call(exclude=torch.arange(8).float()), "exclude must hold integer ids or booleans, got torch.float32"),
    (call(scale=torch.tensor(3)), "scale must be a floating-point tensor, got torch.int64"),
]
VALUES = [
    (call(scale=0.0), "Scale must be a positive value. Got 0.0"),
    (call(scale=-1.0), "Scale must be a positive value."),
    (call(scale=float("nan")), "Scale must be a positive value. Got nan"),
    (call(scale=float("inf")), "Scale must be a positive value. Got inf"),
    (call(scale="20"), "Scale must be a number or a tensor, got '20'"),
    (call(scale=None), "Scale must be a number or a tensor, got None"),
    (call(queries=QUERIES.tolist()), "queries must be a tensor, got list"),
    (call(docs=None), "docs must be a tensor, got NoneType"),
    (call(exclude=[0, 1, 2, 3]), "exclude must be a tensor of integer ids or booleans, or a tileloss.Guide, got list"),
    (call(directions=()), "At least one direction"),
    (call(directions=None), "At least one direction"),
    (call(directions=3), "directions must be a tuple of names, got 3"),
    (call(directions=QUERIES), "Invalid directions: ["),
    (call(directions="query_to_doc"), "write ('query_to_doc',)"),
    (call(directions=("query_to_doc", "doc_to_dog")), "Invalid directions: ['doc_to_dog']"),
    (call(directions=("doc_to_query",)), "'query_to_doc' direction is required"),
    (call(partition="both"), "'joint' or 'per_direction', got 'both'"),
    (call(directions=("query_to_doc", "query_to_query"), partition="per_direction"), "Use partition_mode='joint'"),
    (call(directions=("query_to_doc", "doc_to_doc"), partition="per_direction"), "Use partition_mode='joint'"),
    (call(hardness=("hardest", 1.0)), "hardness_mode must be one of"),
    (call(hardness=("all_negatives", -1.0)), "hardness_strength must be non-negative, got -1.0"),
    (call(hardness=("all_negatives", float("nan"))), "hardness_strength must be non-negative, got nan"),
    (call(hardness="all_negatives"), "hardness must be a pair (mode, strength)"),
    (call(hardness=("all_negatives", float("inf"))), "hardness_strength must be non-negative, got inf"),
    (call(hardness=("all_negatives", "5")), "hardness_strength must be non-negative, got '5'"),
    (call(hardness=1.0), "hardness must be a pair (mode, strength), got 1.0"),
    (call(hardness=("all_negatives",)), "hardness must be a pair (mode, strength)"),
    (
        call(similarity="euclid"),
        "similarity must be one of ['cosine', 'torch_cosine', 'dot', 'euclidean'",
    ),
    (call(similarity=3), "or a callable, got 3"),
    (call(backend="cuda"), "must be 'auto' or one of ['reference', 'tiled', 'triton'], got 'cuda'"),
]


@pytest.mark.parametrize(("mistake", "message"), SHAPES, ids=[m for _, m in SHAPES])
def test_shapes(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises(ShapeError, match=re.escape(message)) as caught:
        mistake()
    assert isinstance(caught.value, ValueError | IndexError | RuntimeError)


@pytest.mark.parametrize(("mistake", "message"), DTYPES, ids=[m for _, m in DTYPES])
def test_dtypes(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises(DtypeError, match=re.escape(message)):
        mistake()


@pytest.mark.parametrize(("mistake", "message"), VALUES, ids=[m for _, m in VALUES])
def test_values(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        mistake()


def test_devices() -> None:
    meta = torch.empty(8, 3, device="meta")
    with pytest.raises(DeviceError, match="queries are on cpu and docs on meta; move both to one device"):
        contrastive_loss(QUERIES, meta)
    with pytest.raises(DeviceError, match="exclude is on meta and the embeddings on cpu"):
        contrastive_loss(QUERIES, DOCS, exclude=torch.empty(4, dtype=torch.long, device="meta"))


@pytest.mark.parametrize(
    ("error", "builtins"),
    [
        (ShapeError, (ValueError, IndexError, RuntimeError)),
        (DtypeError, (ValueError, RuntimeError)),
        (DeviceError, (ValueError, RuntimeError)),
    ],
)
def test_errors_are_also_what_plain_pytorch_raises(error: type, builtins: tuple[type, ...]) -> None:
    assert issubclass(error, InputError)
    assert all(issubclass(error, builtin) for builtin in builtins)


def test_both_functions_check() -> None:
    with pytest.raises(InputError, match="positive"):
        contrastive_loss_with_stats(QUERIES, DOCS, scale=-1.0)


def test_a_tensor_scale_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading its value would make a GPU finish all its work first, in every step."""

    def read(self: Tensor) -> None:
        raise AssertionError("the value was read")

    monkeypatch.undo()
    for name in ("item", "__bool__", "__float__", "tolist"):
        monkeypatch.setattr(Tensor, name, read)
    for backend in ("reference", "tiled"):
        contrastive_loss(QUERIES, DOCS, scale=torch.tensor(3.0), exclude=torch.arange(8), backend=backend)
