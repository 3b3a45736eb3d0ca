"""The loss as a registered operator: whole under torch.compile, and correct by PyTorch's own checks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tileloss
from tileloss import reference, tiled
from tileloss.functional import contrastive_loss, contrastive_loss_with_stats
from tileloss.spec import DIRECTIONS

SYMMETRIC = ("query_to_doc", "doc_to_query")
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def value_and_gradients(loss_of: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    loss = loss_of(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])]


def compiled_equals_eager(loss_of: Callable[..., Tensor], *inputs: Tensor, compiler: str = "aot_eager") -> None:
    compiled = torch.compile(loss_of, fullgraph=True, backend=compiler)
    expected, found = value_and_gradients(loss_of, *inputs), value_and_gradients(compiled, *inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"directions": SYMMETRIC, "partition": "per_direction"},
        {"directions": DIRECTIONS, "hardness": ("hard_negatives", 3.0)},
    ],
)
def test_one_graph_with_the_same_numbers(options: dict, similarity: str, backend: str) -> None:
    torch.manual_seed(0)

    def step(weight: Tensor, x: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
        embeddings = (x @ weight).tanh()
        loss = contrastive_loss(
            embeddings[:20], embeddings[20:], scale=scale.exp(), similarity=similarity, exclude=ids, **options
        )
        return 2 * loss

    compiled_equals_eager(step, torch.randn(8, 5), torch.randn(60, 8), torch.tensor(1.0), torch.arange(20) // 2)


def test_inductor() -> None:
    torch.manual_seed(0)
    compiled_equals_eager(
        lambda q, d: contrastive_loss(q.relu(), d.tanh(), backend="tiled"),
        torch.randn(20, 5),
        torch.randn(20, 5),
        compiler="inductor",
    )


@pytest.mark.filterwarnings("error:.*lru_cache")
def test_automatic_choice_and_a_backend_for_one_call() -> None:
    torch.manual_seed(0)
    compiled_equals_eager(contrastive_loss, torch.randn(20, 5), torch.randn(20, 5))
    compiled_equals_eager(contrastive_loss, torch.randn(300, 5), torch.randn(300, 5))
    compiled_equals_eager(lambda q, d: contrastive_loss(q, d, backend="tiled"), torch.randn(20, 5), torch.randn(20, 5))


def test_one_graph_serves_every_batch_size_and_scale() -> None:
    compiled = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for size, scale in ((3, 20.0), (20, 10.0), (41, 5.0)):
        queries, docs = torch.randn(size, 5), torch.randn(2 * size, 5)
        with tileloss.use_backend("tiled"):
            torch.testing.assert_close(
                compiled(queries, docs, scale=scale), contrastive_loss(queries, docs, scale=scale)
            )


def test_the_compiled_backward_does_not_materialise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition serves second derivatives alone: a compiler that asked for them would cost B x M memory."""
    monkeypatch.setattr(reference, "contrastive_loss", None)
    compiled = torch.compile(lambda q, d: contrastive_loss(q, d, backend="tiled"), fullgraph=True, backend="aot_eager")
    value_and_gradients(compiled, torch.randn(20, 5), torch.randn(20, 5))


def test_statistics_come_through() -> None:
    queries, docs = torch.randn(20, 5, requires_grad=True), torch.randn(20, 5)
    compiled = torch.compile(contrastive_loss_with_stats, fullgraph=True, backend="aot_eager")
    with tileloss.use_backend("tiled"):
        (found, seen), (expected, stats) = compiled(queries, docs), contrastive_loss_with_stats(queries, docs)
    torch.testing.assert_close((found, *seen), (expected, *stats))
    assert not any(x.requires_grad for x in seen)


def test_a_change_of_backend_is_seen() -> None:
    """A compiled function follows `use_backend`: the choice is not frozen into its graph."""
    calls: list[str] = []
    walk = tiled.contrastive_loss

    def spy(*args: object) -> tiled.Result:
        calls.append("tiled")
        return walk(*args)  # type: ignore[arg-type]

    compiled = torch.compile(contrastive_loss, backend="aot_eager")
    queries, docs = torch.randn(20, 5), torch.randn(20, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "contrastive_loss", spy)
        for name, expected in (("reference", 0), ("tiled", 1), ("reference", 1)):
            with tileloss.use_backend(name):
                compiled(queries, docs)
            assert len(calls) == expected


@pytest.mark.parametrize("wanted", [[True, True, True], [True, False, False], [False, False, False]])
@pytest.mark.parametrize(
    ("dtype", "similarity", "directions", "partition", "hardness", "excluded"),
    [
        (torch.float32, "cosine", "query_to_doc", "joint", "", None),
        (torch.float64, "dot", "query_to_doc+doc_to_query", "per_direction", "", "ids"),
        (torch.float32, "euclidean", "+".join(DIRECTIONS), "joint", "all_negatives", "mask"),
        (torch.bfloat16, "cosine", "query_to_doc+doc_to_query", "joint", "", None),
        (torch.float32, "torch_cosine", "query_to_doc+query_to_query+doc_to_doc", "joint", "", "guide"),
    ],
)
def test_opcheck(
    dtype: torch.dtype,
    similarity: str,
    directions: str,
    partition: str,
    hardness: str,
    excluded: str | None,
    wanted: list[bool],
) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(9, 4).to(dtype), torch.randn(18, 4).to(dtype), torch.tensor(3.0).to(dtype)
    queries, docs, scale = (x.requires_grad_(need) for x, need in zip(inputs, wanted, strict=True))
    ids = torch.arange(18) // 2 if excluded == "ids" else None
    mask = torch.rand(9, 18) < 0.3 if excluded == "mask" else None
    guide = (torch.randn(9, 5), torch.randn(18, 5)) if excluded == "guide" else (None, None)
    arguments = (queries, docs, scale if wanted[2] else None, ids, mask, *guide, 0.1, "absolute", 3.0)
    names = (similarity, directions, partition, hardness, 2.0 if hardness else 0.0)
    # bfloat16 gradients agree to their own precision
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(
        torch.ops.tileloss.contrastive.default, (*arguments, *names, wanted, "tiled"), test_utils=CHECKS, **tolerance
    )


def test_environment_is_read_under_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tileloss.backend, "_environment", "reference")
    monkeypatch.setattr(tiled, "contrastive_loss", None)
    queries, docs = torch.randn(300, 5), torch.randn(300, 5)
    torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")(queries, docs)
