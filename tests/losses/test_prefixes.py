"""Which losses compute all widths of a MatryoshkaLoss in one pass, and that it is the sum over widths all the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tileloss import given, losses, paired, similarity
from tileloss.losses import MatryoshkaLoss, prefixes

oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

WEIGHTS = {16: 1.0, 8: 0.5, 3: 0.25}
WIDTH = max(WEIGHTS)
CACHED = {"mini_batch_size": 4}


class Given(given.Given):
    """A model whose features hold its embeddings, and that counts its calls."""

    def __init__(self, key: str = "sentence_embedding") -> None:
        super().__init__(key)
        self.calls = 0

    def get_embedding_dimension(self) -> int:
        return WIDTH

    def __getitem__(self, place: int) -> nn.Module:
        return [self][place]  # the oracle looks at a model's first module

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        self.calls += 1
        return super().forward(features)


def features(dtype: torch.dtype = torch.double, columns: int = 2) -> list[dict[str, Tensor]]:
    """Embeddings of the model, with a graph, and of a guide that likes some negatives better than the positives."""
    generator = torch.Generator().manual_seed(0)

    def column(like: Tensor | None = None) -> Tensor:
        noise = torch.randn(11, WIDTH, dtype=torch.double, generator=generator)
        return (noise if like is None else noise + like).to(dtype)

    own = [column().requires_grad_() for _ in range(columns)]
    guide = column()
    return [
        {"sentence_embedding": x, "guide": guide if i == 0 else column(0.5 * guide.double())}
        for i, x in enumerate(own)
    ]


def outcome(loss: nn.Module, given: list[dict[str, Tensor]], labels: Tensor | None = None) -> list[Tensor]:
    """The value, and the gradients of the embeddings and of what the loss trains itself."""
    own = [*loss.parameters()]
    for x in own:
        x.grad = None
    leaves = [x["sentence_embedding"] for x in given]
    for x in leaves:
        x.grad = None
    value = loss([dict(x) for x in given], labels)
    (value * 0.5).backward()
    return [value.detach(), *(x.grad for x in (*leaves, *own) if x.grad is not None)]


def each_width(loss: nn.Module, given: list[dict[str, Tensor]], labels: Tensor | None = None) -> list[Tensor]:
    """As `outcome` of a MatryoshkaLoss around `loss`, from a call of `loss` for each width."""
    parts: list[list[Tensor]] = []
    for dim, weight in WEIGHTS.items():
        cut = [{**x, "sentence_embedding": x["sentence_embedding"][:, :dim].detach().requires_grad_()} for x in given]
        found = outcome(loss, cut, labels)
        whole = [x if x.ndim < 2 else nn.functional.pad(x, [0, WIDTH - dim]) for x in found]
        parts.append([weight * x for x in whole])
    return [sum(x[1:], x[0]) for x in zip(*parts, strict=True)]


def assert_same(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-9) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


@pytest.fixture
def cosines(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The widths at which paired cosines were asked for, call by call."""
    asked: list[list[int]] = []
    fused = prefixes.prefix_cosines

    def counting(a: Tensor, b: Tensor, dims: list[int]) -> Tensor:
        asked.append(dims)
        return fused(a, b, dims)

    monkeypatch.setattr(prefixes, "prefix_cosines", counting)
    return asked


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, float]]:
    """What the fused function was asked for, call by call."""
    asked: list[dict[int, float]] = []
    fused = prefixes.matryoshka_and_seen

    def counting(call: Any, dims: Any) -> Any:
        asked.append(dict(dims))
        return fused(call, dims)

    monkeypatch.setattr(prefixes, "matryoshka_and_seen", counting)
    return asked


def ranking(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: losses.MultipleNegativesRankingLoss(model, **options)


def cached(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: losses.CachedMultipleNegativesRankingLoss(model, **CACHED, **options)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.tensor(5.0, dtype=torch.double))


FUSED = {
    "ranking": ranking(),
    "dot products, which are cosines then": ranking(similarity_fct=similarity.dot_score, scale=3.0),
    "hardness and directions": ranking(
        directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
        hardness_mode="in_batch_negatives",
        hardness_strength=3.0,
    ),
    "a trained scale": lambda model: ranking(scale=parameter())(model),
    "cached": cached(),
    "cached, a trained scale": lambda model: cached(scale=parameter())(model),
    "guided": lambda model: losses.GISTEmbedLoss(model, Given("guide"), temperature=0.3),
    "cached and guided": lambda model: losses.CachedGISTEmbedLoss(model, Given("guide"), temperature=0.3, **CACHED),
}


@pytest.mark.parametrize("name", FUSED)
def test_all_widths_take_one_pass(name: str, passes: list[dict[int, float]], backend: str) -> None:
    model, given = Given(), features()
    inner = FUSED[name](model)
    loss = MatryoshkaLoss(model, inner, list(WEIGHTS), list(WEIGHTS.values()))
    found = outcome(loss, given)
    assert passes == [WEIGHTS]
    assert model.calls == (12 if "cached" in name else 2), "once a column; under a cache twice for each mini-batch"
    expected = each_width(inner, given)
    assert passes == [WEIGHTS], "the inner loss alone is as it was"
    if "dot" in name:  # of unit rows
        expected = each_width(ranking(scale=3.0)(model), given)
    assert_same(found, expected)


def test_ids_exclude_at_every_width(passes: list[dict[int, float]], backend: str) -> None:
    model, given, labels = Given(), features(columns=3), torch.arange(11) // 2
    for make in (ranking, cached):
        inner = make(exclude_same_label=True)(model)
        found = outcome(MatryoshkaLoss(model, inner, list(WEIGHTS), list(WEIGHTS.values())), given, labels)
        assert_same(found, each_width(inner, given, labels))
    assert len(passes) == 2


PAIRED = {
    "ranked cosines": lambda model: losses.CoSENTLoss(model),
    "ranked products, which are cosines then": lambda model: losses.CoSENTLoss(model, 3.0, paired.pairwise_dot_score),
    "cosines": lambda model: losses.CosineSimilarityLoss(model),
    "transformed cosines": lambda model: losses.CosineSimilarityLoss(model, nn.L1Loss(), torch.sigmoid),
}


@pytest.mark.parametrize("name", PAIRED)
def test_paired_cosines_of_all_widths_take_one_pass(name: str, cosines: list[list[int]], backend: str) -> None:
    model, given, labels = Given(), features(), torch.linspace(-1, 1, 11, dtype=torch.double)
    inner = PAIRED[name](model)
    found = outcome(MatryoshkaLoss(model, inner, list(WEIGHTS), list(WEIGHTS.values())), given, labels)
    assert cosines == [list(WEIGHTS)]
    if "products" in name:  # of unit rows
        inner.similarity_fct = paired.pairwise_cos_sim
    assert_same(found, each_width(inner, given, labels), 1e-8)
    message = "Dimension 17 in matryoshka_dims cannot be greater than the model's embedding dimension: 16"
    with inner.at_prefixes({17: 1.0}), pytest.raises(ValueError, match=message):
        inner([dict(x) for x in given], labels)


class Elsewhere(losses.MultipleNegativesRankingLoss):
    """A user's own: what it does to embeddings cannot be known."""

    def forward(self, *args: Any) -> Tensor:
        return super().forward(*args) + 1.0


Elsewhere.__module__ = "somewhere.of.a.user"


def replaced_part(model: nn.Module) -> nn.Module:
    loss = losses.MultipleNegativesRankingLoss(model)
    compute = loss.compute_loss_from_embeddings
    loss.compute_loss_from_embeddings = lambda embeddings, labels: 1.0 + compute(embeddings, labels)
    return loss


def replaced_similarity(model: nn.Module) -> nn.Module:
    loss = losses.GISTEmbedLoss(model, Given("guide"), temperature=0.3)
    loss.similarity_fct = nn.CosineSimilarity(dim=-1, eps=0.5)
    return loss


def shift(a: Tensor, b: Tensor) -> Tensor:
    return similarity.dot_score(a, b) - 0.1 * a[:, :1]


NOT_FUSED = {
    "another library's": oracle.MultipleNegativesRankingLoss,
    "another library's, cached": lambda model: oracle.CachedMultipleNegativesRankingLoss(model, **CACHED),
    "a user's": Elsewhere,
    "a replaced part": replaced_part,
    "a replaced similarity": replaced_similarity,
    "Euclidean distances": ranking(similarity_fct=similarity.euclidean_sim),
    "Euclidean distances, cached": cached(similarity_fct=similarity.euclidean_sim),
    "a trained scale of distances": lambda model: ranking(similarity_fct=similarity.euclidean_sim, scale=parameter())(
        model
    ),
    "a trained scale of distances, cached": lambda model: cached(
        similarity_fct=similarity.euclidean_sim, scale=parameter()
    )(model),
    "a similarity of the user's": ranking(similarity_fct=shift),
    "a gathered batch": ranking(gather_across_devices=True),
    "ranked distances": lambda model: losses.CoSENTLoss(model, 3.0, paired.pairwise_euclidean_sim),
    "angles": losses.AnglELoss,
    "mega-batch": lambda model: losses.MegaBatchMarginLoss(model, use_mini_batched_version=False),
    "cached mega-batch": lambda model: losses.MegaBatchMarginLoss(model, **CACHED),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_other_losses_are_called_for_each_width(
    name: str, passes: list[dict[int, float]], cosines: list[list[int]]
) -> None:
    model, given = Given(), features()
    inner = NOT_FUSED[name](model)
    labels = torch.linspace(-1, 1, 11, dtype=torch.double)
    found = outcome(MatryoshkaLoss(model, inner, list(WEIGHTS), list(WEIGHTS.values())), given, labels)
    assert not passes
    assert not cosines
    unit = Given()
    unit.forward = lambda features: {"sentence_embedding": nn.functional.normalize(features["sentence_embedding"])}
    inner.model = unit
    for child in inner.children():
        if hasattr(child, "model"):
            child.model = unit
    assert_same(found, each_width(inner, given, labels))


def test_a_guide_that_is_the_model_is_cut_with_it(passes: list[dict[int, float]]) -> None:
    found = []
    for library in (losses, oracle):
        model, given = Given(), features()
        loss = library.GISTEmbedLoss(model, model, temperature=0.3)
        found.append(outcome(library.MatryoshkaLoss(model, loss, list(WEIGHTS)), given))
    assert not passes
    assert_same(*found)


def test_a_loss_around_another_model_is_left_alone(passes: list[dict[int, float]]) -> None:
    """The embeddings are then whole: it is not its model whose embeddings are cut."""
    found = []
    for library in (losses, oracle):
        given = features()
        loss = library.MatryoshkaLoss(Given(), library.MultipleNegativesRankingLoss(Given()), list(WEIGHTS))
        found.append(outcome(loss, given))
    assert not passes
    assert_same(*found)


def test_a_width_given_twice_counts_twice(passes: list[dict[int, float]]) -> None:
    model, given = Given(), features()
    found = outcome(MatryoshkaLoss(model, ranking()(model), [16, 3, 16], [1.0, 0.5, 0.25]), given)
    assert passes == [{16: 1.25, 3: 0.5}]
    theirs = oracle.MatryoshkaLoss(model, oracle.MultipleNegativesRankingLoss(model), [16, 3, 16], [1.0, 0.5, 0.25])
    assert_same(found, outcome(theirs, given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_embeddings_are_not_rounded_on_the_way(dtype: torch.dtype) -> None:
    """Rows of length 10,000 in float16 are lost in the definition, which normalises in the dtype of the rows."""
    model, given = Given(), features(dtype)
    exact = [{"sentence_embedding": x["sentence_embedding"].detach().double().requires_grad_()} for x in given]
    found, expected = (outcome(MatryoshkaLoss(model, ranking()(model), list(WEIGHTS)), x) for x in (given, exact))
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=0)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert a.dtype == dtype
        assert (a - b).norm() <= 2 * torch.finfo(dtype).eps * b.norm()


def test_the_second_derivative_is_that_of_the_sum() -> None:
    model, given = Given(), features()
    leaf = given[0]["sentence_embedding"]
    inner = ranking()(model)

    def second(value: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(value, leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    whole = MatryoshkaLoss(model, inner, list(WEIGHTS), list(WEIGHTS.values()))
    expected = sum(
        weight * inner([{"sentence_embedding": x["sentence_embedding"][:, :dim]} for x in given])
        for dim, weight in WEIGHTS.items()
    )
    torch.testing.assert_close(second(whole(given)), second(expected), rtol=1e-9, atol=1e-12)
