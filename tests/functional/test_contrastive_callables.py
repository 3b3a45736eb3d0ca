"""Similarities that are Python functions: in row blocks where they say they may be, else materialised, said once."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import tileloss
from tileloss import reference, rowwise, tiled
from tileloss.backend import _said
from tileloss.errors import BackendError, FallbackWarning
from tileloss.functional import contrastive_loss
from tileloss.similarity import cos_sim
from tileloss.spec import DIRECTIONS

SYMMETRIC = ("query_to_doc", "doc_to_query")


@rowwise
def angular(a: Tensor, b: Tensor) -> Tensor:
    return 1 - cos_sim(a, b).clamp(-0.999, 0.999).acos()


@rowwise
def asymmetric(a: Tensor, b: Tensor) -> Tensor:
    return a[:, :2] @ b[:, 1:3].T + 0.5 * a[:, :1] - b[:, 1:2].T.square()


@rowwise
def aliasing(a: Tensor, b: Tensor) -> Tensor:
    """Returns an expanded view: no entry may be written to in place."""
    return a.sum(dim=1, keepdim=True).expand(len(a), len(b)) * 1.0 + b.sum(dim=1)


def plain(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T / (1 + a.norm(dim=1, keepdim=True))


@pytest.fixture(autouse=True)
def _nothing_said() -> None:
    _said.clear()


def value_and_gradients(
    similarity: object, backend: str, dtype: torch.dtype = torch.double, **options: object
) -> list:
    torch.manual_seed(0)
    inputs = [x.to(dtype).requires_grad_() for x in (torch.randn(20, 4), torch.randn(40, 4), torch.tensor(3.0))]
    loss = contrastive_loss(inputs[0], inputs[1], scale=inputs[2], similarity=similarity, backend=backend, **options)  # type: ignore[arg-type]
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"directions": SYMMETRIC, "partition": "per_direction"},
        {"directions": DIRECTIONS, "hardness": ("all_negatives", 2.0)},
        {"directions": ("query_to_doc", "query_to_query", "doc_to_doc"), "exclude": torch.arange(20) // 3},
    ],
)
@pytest.mark.parametrize("similarity", [angular, asymmetric, aliasing])
def test_rowwise_in_blocks_equals_materialised(similarity: object, options: dict, small_blocks: int) -> None:
    found = value_and_gradients(similarity, "tiled", **options)
    for a, b in zip(found, value_and_gradients(similarity, "reference", **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_rowwise_sees_blocks_only(small_blocks: int) -> None:
    seen: list[int] = []

    @rowwise
    def spy(a: Tensor, b: Tensor) -> Tensor:
        seen.append(len(a))
        return a @ b.T

    value_and_gradients(spy, "tiled")
    assert max(seen) == small_blocks


def test_rowwise_runs_tiled_without_a_word() -> None:
    queries, docs = torch.randn(300, 4), torch.randn(300, 4)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr(reference, "contrastive_loss", None)
        contrastive_loss(queries, docs, similarity=angular)


def test_plain_callable_is_materialised_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, docs = torch.randn(300, 4), torch.randn(300, 4)
    monkeypatch.setattr(tiled, "contrastive_loss", None)
    with pytest.warns(FallbackWarning, match="to the 'reference' backend: the similarity .*plain.* tileloss.rowwise"):
        first = contrastive_loss(queries, docs, similarity=plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = contrastive_loss(queries, docs, similarity=plain)
    logits = 20.0 * plain(queries, docs)
    expected = nn.functional.cross_entropy(logits, torch.arange(300))
    torch.testing.assert_close((first, again), (expected, expected))


def test_forcing_blocks_on_a_plain_callable_says_why_not() -> None:
    with pytest.raises(
        BackendError, match=r"'tiled' was asked for and cannot run: .*nor declared by tileloss.rowwise"
    ):
        value_and_gradients(plain, "tiled")


@pytest.mark.parametrize("similarity", [plain, angular])
def test_second_derivatives(similarity: object, small_blocks: int) -> None:
    torch.manual_seed(0)
    backend = "reference" if similarity is plain else "tiled"
    inputs = [torch.randn(4, 3).double().requires_grad_(), torch.randn(8, 3).double().requires_grad_()]
    torch.autograd.gradgradcheck(
        lambda q, d: contrastive_loss(q, d, scale=2.0, similarity=similarity, backend=backend), inputs, atol=1e-5
    )


@pytest.mark.parametrize("similarity", [plain, angular, asymmetric])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_embeddings_give_a_float32_loss(dtype: torch.dtype, similarity: object) -> None:
    for backend in ("reference",) if similarity is plain else ("reference", "tiled"):
        loss, d_queries, *_ = value_and_gradients(similarity, backend, dtype)
        assert (loss.dtype, d_queries.dtype) == (torch.float32, dtype)


class Bilinear(nn.Module):
    """A similarity that is trained along."""

    is_rowwise = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ self.weight @ b.T


def test_the_parameters_of_a_similarity_are_trained() -> None:
    """Row blocks differentiate the rows alone, so such a similarity is materialised, though it is row-wise."""
    torch.manual_seed(0)
    similarity, queries, docs = Bilinear(), torch.randn(300, 4), torch.randn(300, 4)
    with pytest.warns(FallbackWarning, match="has parameters"):
        contrastive_loss(queries, docs, similarity=similarity).backward()
    logits = 20.0 * queries @ similarity.weight @ docs.T
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(logits, torch.arange(300)), similarity.weight)
    torch.testing.assert_close(similarity.weight.grad, expected)

    with pytest.raises(BackendError, match="has parameters"), tileloss.use_backend("tiled"):
        contrastive_loss(queries, docs, similarity=similarity)
    with torch.no_grad(), tileloss.use_backend("tiled"):
        found = contrastive_loss(queries, docs, similarity=similarity)
    torch.testing.assert_close(found, nn.functional.cross_entropy(logits, torch.arange(300)).detach())
