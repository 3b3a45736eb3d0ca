"""MatryoshkaLoss is sentence-transformers' in value, gradients, draws, errors and settings, around losses of both."""

import copy
import logging
import pickle
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tileloss import losses, similarity
from tileloss.errors import InputError, KindError
from tileloss.losses import MatryoshkaLoss

oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

DIMS, WEIGHTS = (3, 16, 8), (0.25, 1.0, 0.5)
WIDTH = 16


class Inner(nn.Module):
    """The mean of a function of the first two columns' embeddings and the labels."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.model = model
        self.function = function or (lambda a, b, labels: (a * b).sum(1).exp())

    def forward(self, features: list[dict[str, Any]], labels: Tensor | None) -> Tensor:
        a, b = (self.model(x)["sentence_embedding"] for x in features[:2])
        return self.function(a, b, labels).mean()


class Given(nn.Module):
    """A model whose features hold its embeddings, and that counts its calls."""

    def __init__(self, width: int | None = WIDTH) -> None:
        super().__init__()
        self.width, self.calls = width, 0

    def get_embedding_dimension(self) -> int | None:
        return self.width

    def __getitem__(self, place: int) -> nn.Module:
        return [self][place]  # the oracle looks at a model's first module

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        self.calls += 1
        return {"sentence_embedding": features["given"]}


def given(rows: int = 9, columns: int = 2, dtype: torch.dtype = torch.double) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(rows, WIDTH, generator=generator, dtype=torch.double) for _ in range(columns))
    return [{"given": x.to(dtype).requires_grad_()} for x in made]


def step(loss: nn.Module, features: list[dict[str, Any]], leaves: list[Tensor], labels: Any = None) -> list[Tensor]:
    """Value and gradients of one step from fixed seeds, in which the returned loss is scaled."""
    random.seed(3)
    torch.manual_seed(2)
    value = loss([dict(x) for x in features], labels)
    (0.5 * value).backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    for x in leaves:
        x.grad = None
    return [value.detach(), *gradients]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-8) -> None:
    assert len(found) == len(expected)
    largest = max(x.norm() for x in expected[1:])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * (b.norm() + 1e-3 * largest)


INNER = {
    "ranking": ("MultipleNegativesRankingLoss", {}),
    "four directions and hardness": (
        "MultipleNegativesRankingLoss",
        {
            "directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
            "hardness_mode": "all_negatives",
            "hardness_strength": 2.0,
        },
    ),
    "dot products": ("MultipleNegativesRankingLoss", {"similarity_fct": similarity.dot_score, "scale": 3.0}),
    "Euclidean distances": ("MultipleNegativesRankingLoss", {"similarity_fct": similarity.euclidean_sim}),
    "symmetric": ("MultipleNegativesSymmetricRankingLoss", {}),
    "mega-batch": ("MegaBatchMarginLoss", {"use_mini_batched_version": False}),
    "cached ranking": ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 5}),
    "cached symmetric": ("CachedMultipleNegativesSymmetricRankingLoss", {"mini_batch_size": 5}),
    "cached Euclidean": (
        "CachedMultipleNegativesRankingLoss",
        {"mini_batch_size": 5, "similarity_fct": similarity.euclidean_sim},
    ),
    "cached mega-batch": ("MegaBatchMarginLoss", {"mini_batch_size": 5}),
    "mined triplets": ("BatchHardTripletLoss", {"margin": 0.5}),
    "ranked pairs": ("CoSENTLoss", {}),
    "angles of pairs": ("AnglELoss", {}),
    "cosines of pairs": ("CosineSimilarityLoss", {}),
    "a teacher of two columns": ("MSELoss", {}),
    "an exact teacher of two columns": ("EmbedDistillLoss", {"distance_metric": "cosine"}),
    "guided": ("GISTEmbedLoss", {"temperature": 0.2, "margin": 0.02}),
    "cached guided": ("CachedGISTEmbedLoss", {"temperature": 0.2, "contrast_anchors": False, "mini_batch_size": 5}),
}


def another(encoder: nn.Module) -> nn.Module:
    """A guide: the encoder with other weights."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for x in encoder.parameters():
            x += 0.1 * torch.randn(x.shape, dtype=x.dtype, generator=generator)
    return encoder.eval()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the symmetric losses
@pytest.mark.parametrize("steps", [-1, 2])
@pytest.mark.parametrize("name", INNER)
def test_it_trains_a_transformer_with_dropout_as_the_oracle_does(
    name: str, steps: int, tiny_encoder: Callable[[], Any], texts: Callable[..., list[str]], backend: str
) -> None:
    kind, options = INNER[name]
    results = []
    for library in (losses, oracle):
        model = tiny_encoder().double()
        columns = 2 if any(word in name for word in ("mega", "pairs", "two")) else 3
        features = [model.preprocess(texts(13, seed)) for seed in range(columns)]
        generator = torch.Generator().manual_seed(4)
        if name == "mined triplets":
            features, labels = features[:1], torch.arange(13) % 3
        else:
            labels = torch.rand((13, 2, WIDTH) if "teacher" in name else (13,), generator=generator).double()
        guide = {"guide": another(tiny_encoder().double())} if "guided" in name else {}
        inner = getattr(library, kind)(model, **guide, **options)
        loss = library.MatryoshkaLoss(model, inner, DIMS, WEIGHTS, n_dims_per_step=steps)
        results.append(step(loss, features, list(model.parameters()), labels))
    assert_same(*results)


@pytest.mark.parametrize("outer", [losses, oracle], ids=["our wrapper", "their wrapper"])
@pytest.mark.parametrize("kind", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_either_library_wraps_the_others_losses(
    outer: Any, kind: str, tiny_encoder: Callable[[], Any], texts: Callable[..., list[str]]
) -> None:
    inner = oracle if outer is losses else losses
    results = []
    for wrapper, wrapped in ((outer, inner), (oracle, oracle)):
        model = tiny_encoder().double()
        features = [model.preprocess(texts(13, seed)) for seed in range(3)]
        loss = wrapper.MatryoshkaLoss(model, getattr(wrapped, kind)(model), DIMS, WEIGHTS)
        results.append(step(loss, features, list(model.parameters())))
    assert_same(*results)


@pytest.mark.parametrize(
    "make",
    [
        lambda library, model: library.MultipleNegativesRankingLoss(model),
        lambda library, model: library.CachedMultipleNegativesRankingLoss(model),
        lambda library, model: Inner(model),
    ],
    ids=["all widths at once", "all widths at once, cached", "each width by itself"],
)
def test_the_same_widths_are_drawn(make: Callable[[Any, Any], nn.Module]) -> None:
    """Ten steps from one seed; afterwards both have drawn as often."""
    features, values, states = given(), [], []
    for library in (losses, oracle):
        model = Given()
        loss = library.MatryoshkaLoss(model, make(library, model), [2, 3, 5, 8, 16], n_dims_per_step=2)
        random.seed(0)
        with torch.no_grad():
            values.append([loss(features, None).item() for _ in range(10)])
        states.append(random.getstate())
    assert values[0] == pytest.approx(values[1], rel=1e-10)
    assert len(set(values[0])) > 3
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("make", "columns"),
    [(losses.MultipleNegativesRankingLoss, 2), (losses.MultipleNegativesRankingLoss, 4), (Inner, 2)],
)
def test_the_model_runs_once_for_all_widths(make: Callable[[Any], nn.Module], columns: int) -> None:
    model = Given()
    MatryoshkaLoss(model, make(model), [16, 16, 8, 4])(given(columns=columns), None)
    assert model.calls == columns
    assert "forward" not in vars(model)


def test_it_is_the_sum_of_the_losses_of_prefixes(backend: str) -> None:
    """And one full width is the loss of unit rows: the plain loss, by cosine."""
    features = given()
    model = Given()
    plain = losses.MultipleNegativesRankingLoss(model)
    expected = torch.zeros((), dtype=torch.double)
    for dim, weight in zip(DIMS, WEIGHTS, strict=True):
        expected += weight * plain([{"given": x["given"][:, :dim]} for x in features])
    torch.testing.assert_close(MatryoshkaLoss(model, plain, DIMS, WEIGHTS)(features), expected)
    torch.testing.assert_close(MatryoshkaLoss(model, plain, [WIDTH])(features), plain(features))


@pytest.mark.parametrize("shape", [(9,), (9, 1), (9, WIDTH), (2, 9, WIDTH), (9, 5), (1, 2, 9, WIDTH)], ids=str)
def test_labels_as_wide_as_the_model_are_cut(shape: tuple[int, ...]) -> None:
    """And not normalised; all other labels are handed on as they are."""
    seen: dict[Any, list[Tensor]] = {}
    labels = torch.randn(shape)
    for library in (losses, oracle):
        model = Given()
        inner = Inner(model, lambda a, b, given, library=library: seen.setdefault(library, []).append(given) or a * b)
        library.MatryoshkaLoss(model, inner, DIMS)(given(), labels)
    assert len(seen[losses]) == 3
    for found, expected in zip(seen[losses], seen[oracle], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("labels", [None, "no tensor"])
def test_other_labels_are_handed_on(labels: Any) -> None:
    model, seen = Given(), []
    MatryoshkaLoss(model, Inner(model, lambda a, b, labels: seen.append(labels) or a * b), DIMS)(given(), labels)
    assert seen == [labels] * 3


@pytest.mark.parametrize("magnitude", [1.0, 0.0, 3e4], ids=["ordinary", "zero rows", "infinite norms"])
def test_float16_is_cut_in_float16(magnitude: float) -> None:
    """With what comes of that: nan from a row of zeros, zero from one whose norm float16 does not hold."""
    values = []
    for library in (losses, oracle):
        model, features = Given(), given(dtype=torch.half)
        features = [{"given": x["given"].detach().sign() * magnitude} for x in features]
        values.append(library.MatryoshkaLoss(model, Inner(model), DIMS)(features, None))
    torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)
    assert values[0].isnan() == (magnitude != 1.0)


@pytest.mark.parametrize(
    "make",
    [
        losses.MultipleNegativesRankingLoss,
        losses.CachedMultipleNegativesRankingLoss,
        oracle.CachedMultipleNegativesRankingLoss,
        losses.MegaBatchMarginLoss,
        Inner,
    ],
)
def test_a_model_or_a_loss_is_as_before_whatever_is_raised(make: Callable[[Any], nn.Module]) -> None:
    model = Given()
    inner = make(model)
    loss = MatryoshkaLoss(model, inner, DIMS)
    before = dict(vars(model)), dict(vars(inner))
    a, b = given()
    with pytest.raises((RuntimeError, IndexError)):
        loss([a, {"given": b["given"][:-1]}], None)
    model.calls = 0
    assert (vars(model), vars(inner)) == before
    model.forward = forward = lambda features: {"sentence_embedding": 2 * features["given"]}
    loss(given(), None)
    assert model.forward is forward, "one that was put there, as accelerate does, is put back"


def test_a_cached_loss_alone_is_the_loss_alone() -> None:
    """The oracle leaves its inner loss changed; two wrappers around one then multiply."""
    model, features = Given(), given()
    inner = losses.CachedMultipleNegativesRankingLoss(model)
    expected = inner(features).item()
    wide, both = MatryoshkaLoss(model, inner, [WIDTH]), MatryoshkaLoss(model, inner, [WIDTH, WIDTH])
    assert [inner(features).item(), wide(features).item()] == pytest.approx([expected] * 2)
    assert both(features).item() == pytest.approx(2 * expected)


WRONG = [
    ({"matryoshka_dims": []}, "You must provide at least one dimension in matryoshka_dims."),
    ({"matryoshka_dims": [16, 0]}, "All dimensions passed to a matryoshka loss must be > 0."),
    (
        {"matryoshka_dims": [16, 8], "matryoshka_weights": [1]},
        "matryoshka_weights must be the same length as matryoshka_dims.",
    ),
    (
        {"matryoshka_dims": [17, 8]},
        "Dimensions in matryoshka_dims cannot exceed the model's embedding dimension of 16.",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message for _, message in WRONG])
def test_the_constructor_refuses_what_the_oracle_refuses(options: dict[str, Any], message: str) -> None:
    model = Given()
    for library in (losses, oracle):
        with pytest.raises(ValueError, match=re.escape(message)):
            library.MatryoshkaLoss(model, Inner(model), **options)
    with pytest.raises(InputError):
        MatryoshkaLoss(model, Inner(model), **options)


@pytest.mark.parametrize("kind", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_a_width_that_the_embeddings_do_not_have_is_refused_at_the_call(kind: str) -> None:
    """A model that does not know its own width is found out then."""
    model = Given(width=None)
    for library in (losses, oracle):
        loss = library.MatryoshkaLoss(model, getattr(library, kind)(model), [17, 8])
        message = "Dimension 17 in matryoshka_dims cannot be greater than the model's embedding dimension: 16"
        with pytest.raises(ValueError, match=message):
            loss(given(), None)


def test_a_loss_with_named_parts_is_refused_as_the_oracle_refuses_it() -> None:
    model = Given()
    for library in (losses, oracle):
        inner = library.GlobalOrthogonalRegularizationLoss(model)
        with pytest.raises(TypeError):
            library.MatryoshkaLoss(model, inner, DIMS)(given(), None)
    with pytest.raises(KindError, match="GlobalOrthogonalRegularizationLoss returned a dict"):
        MatryoshkaLoss(model, losses.GlobalOrthogonalRegularizationLoss(model), DIMS)(given(), None)


def test_a_missing_full_width_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = Given()
    with caplog.at_level(logging.WARNING):
        MatryoshkaLoss(model, Inner(model), [16, 8])
        MatryoshkaLoss(Given(None), Inner(model), [8])
        assert not caplog.records
        MatryoshkaLoss(model, Inner(model), [8])
    assert "16 is not in matryoshka_dims" in caplog.text


def test_settings_are_the_oracles() -> None:
    model = Given()
    ours, theirs = (library.MatryoshkaLoss(model, Inner(model), DIMS, WEIGHTS, 2) for library in (losses, oracle))
    assert list(ours.get_config_dict().items()) == list(theirs.get_config_dict().items())
    assert ours.matryoshka_dims == (16, 8, 3)
    assert ours.citation.split(",")[0] == theirs.citation.split(",")[0]
    assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
    assert ours.uses_gradient_cache is theirs.uses_gradient_cache is False
    assert MatryoshkaLoss(model, Inner(model), DIMS).get_config_dict()["matryoshka_weights"] == (1, 1, 1)
    assert MatryoshkaLoss(model, losses.CachedMultipleNegativesRankingLoss(model), DIMS).uses_gradient_cache is True


def test_statistics_are_those_of_the_inner_loss() -> None:
    model, features = Given(), given()
    inner = losses.MultipleNegativesRankingLoss(model)
    loss = MatryoshkaLoss(model, inner, DIMS)
    assert loss.stats is None
    loss(features)
    at_smallest = losses.MultipleNegativesRankingLoss(model)
    at_smallest([{"given": x["given"][:, : min(DIMS)]} for x in features])
    torch.testing.assert_close(tuple(loss.stats), tuple(at_smallest.stats))
    assert MatryoshkaLoss(model, Inner(model), DIMS).stats is None


@pytest.mark.parametrize("kind", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_copies_and_pickles(kind: str) -> None:
    model, features = Given(), given()
    loss = MatryoshkaLoss(model, getattr(losses, kind)(model), DIMS)
    value = loss(features)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(features), value)


def test_a_compiled_model_is_cut_too(tiny_encoder: Callable[[], Any]) -> None:
    """As a trainer puts it into the losses after they were made."""
    results = []
    for compiled in (False, True):
        model = tiny_encoder().double().eval()
        features = [model.preprocess([f"w{i} w{i + column}" for i in range(7)]) for column in range(3)]
        loss = MatryoshkaLoss(model, losses.TripletLoss(model), DIMS, WEIGHTS)
        if compiled:
            loss.model = loss.loss.model = torch.compile(model, backend="eager")
        results.append(step(loss, features, list(model.parameters())))
        assert "forward" not in vars(model)
    assert_same(*results)


def test_the_model_of_the_moment_is_used() -> None:
    """A trainer puts a wrapped model into the losses after they were made."""

    class Wrapped(Given):
        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            return {"sentence_embedding": super().forward(features)["sentence_embedding"].flip(1)}

    first, second = Given(), Wrapped()
    loss = MatryoshkaLoss(first, losses.MultipleNegativesRankingLoss(first), DIMS)
    loss.model = loss.loss.model = second
    expected = MatryoshkaLoss(second, losses.MultipleNegativesRankingLoss(second), DIMS)
    assert torch.equal(loss(given()), expected(given()))
    assert first.calls == 0
