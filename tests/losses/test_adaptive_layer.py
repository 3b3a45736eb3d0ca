"""The losses at several layers are sentence-transformers' in value, gradients, draws, errors and settings."""

import copy
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tileloss import losses
from tileloss.errors import InputError, KindError
from tileloss.losses import AdaptiveLayerLoss, Matryoshka2dLoss

oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

LIBRARIES = (losses, oracle)
DIMS = [16, 8, 3]


def step(loss: nn.Module, features: list[dict[str, Any]]) -> list[Tensor]:
    """Value and gradients of one step from fixed seeds, dropout on, and the random state that it leaves."""
    random.seed(3)
    torch.manual_seed(2)
    value = loss([dict(x) for x in features], None)
    (0.5 * value).backward()
    gradients = [p.grad for p in loss.parameters() if p.grad is not None]
    return [value.detach(), *gradients, torch.tensor(random.random())]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    largest = max(x.norm() for x in expected[1:])
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-8 * (b.norm() + 1e-3 * largest)


@pytest.fixture
def batch(tiny_encoder: Callable[[], Any], texts: Callable[..., list[str]]) -> Callable[..., tuple[Any, list[Any]]]:
    """Makes a double precision SentenceTransformer and features of some columns, equal ones every time."""

    def make(columns: int = 3) -> tuple[Any, list[Any]]:
        model = tiny_encoder().double()
        return model, [model.preprocess(texts(11, seed)) for seed in range(columns)]

    return make


OPTIONS = [
    {},
    {"n_layers_per_step": -1},
    {"n_layers_per_step": 2, "layer_weighting": "linear", "last_layer_weight": 0.3},
    {"n_layers_per_step": -1, "layer_weighting": "log", "prior_layers_weight": 2.0, "kl_temperature": 1.5},
    {"n_layers_per_step": -1, "layer_weighting": lambda layer: 3.0 + layer, "kl_div_weight": 0.1},
    {"kl_temperature": 0},
    {"n_layers_per_step": 7, "kl_div_weight": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_layers_are_trained_as_the_oracle_trains_them(
    options: dict[str, Any], batch: Callable[..., tuple[Any, list[Any]]], backend: str
) -> None:
    results = []
    for library in LIBRARIES:
        model, features = batch()
        inner = library.MultipleNegativesRankingLoss(model)
        results.append(step(library.AdaptiveLayerLoss(model, inner, **options), features))
        assert model[0].auto_model.config.output_hidden_states is False
    assert_same(*results)


@pytest.mark.parametrize(
    "options", [{}, {"matryoshka_weights": [1.0, 0.5, 0.2], "n_layers_per_step": -1, "n_dims_per_step": 2}], ids=str
)
@pytest.mark.parametrize("kind", ["MultipleNegativesRankingLoss", "MegaBatchMarginLoss"])
def test_layers_and_widths_are_trained_as_the_oracle_trains_them(
    kind: str, options: dict[str, Any], batch: Callable[..., tuple[Any, list[Any]]], backend: str
) -> None:
    results = []
    for library in LIBRARIES:
        mega_batch = kind == "MegaBatchMarginLoss"
        model, features = batch(2 if mega_batch else 3)
        inner = getattr(library, kind)(model, **({"use_mini_batched_version": False} if mega_batch else {}))
        results.append(step(library.Matryoshka2dLoss(model, inner, DIMS, **options), features))
    assert_same(*results)


@pytest.mark.parametrize("middle", LIBRARIES, ids=["our widths", "their widths"])
@pytest.mark.parametrize("outer", LIBRARIES, ids=["our layers", "their layers"])
@pytest.mark.parametrize("inner", LIBRARIES, ids=["our loss", "their loss"])
def test_the_libraries_mix(inner: Any, middle: Any, outer: Any, batch: Callable[..., tuple[Any, list[Any]]]) -> None:
    """Three columns, which share a forward pass unless the outer loss forbids it, whose ever the inner one is."""
    results = []
    for kinds in ((inner, middle, outer), (oracle, oracle, oracle)):
        model, features = batch(3)
        loss = kinds[0].MultipleNegativesRankingLoss(model)
        loss = kinds[1].MatryoshkaLoss(model, loss, DIMS)
        results.append(step(kinds[2].AdaptiveLayerLoss(model, loss), features))
    assert_same(*results)


def test_a_compiled_or_distributed_model_is_unwrapped(batch: Callable[..., tuple[Any, list[Any]]]) -> None:
    """As a trainer puts it there, after the loss was made; on a GPU it hands the model a copy of the features."""

    class Distributed(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            return self.module(dict(features))

    model, features = batch()
    expected = step(AdaptiveLayerLoss(model, losses.MultipleNegativesRankingLoss(model)), features)
    for wrap in (Distributed, lambda model: Distributed(Distributed(model))):
        model, features = batch()
        loss = AdaptiveLayerLoss(model, losses.MultipleNegativesRankingLoss(model))
        loss.model = loss.loss.model = wrap(model)
        assert_same(step(loss, features), expected)
    model, features = batch()
    loss = AdaptiveLayerLoss(torch.compile(model, backend="eager"), losses.MultipleNegativesRankingLoss(model))
    assert_same(step(loss, features), expected)


def test_what_cannot_be_unwrapped_is_refused(batch: Callable[..., tuple[Any, list[Any]]]) -> None:
    class Other(nn.Module):
        module = nn.Identity()

    for library in LIBRARIES:
        model, features = batch(2)
        loss = library.AdaptiveLayerLoss(model, library.MultipleNegativesRankingLoss(model))
        loss.model = Other()
        with pytest.raises(TypeError, match=r"could not unwrap Other to a BaseModel \(stopped at Identity\)"):
            loss(features, None)


def test_other_models_are_refused(tiny_encoder: Callable[[], Any]) -> None:
    """The oracle's error for a module without modules is that it is not subscriptable: a TypeError."""
    st = pytest.importorskip("sentence_transformers")
    model = st.SentenceTransformer(modules=[nn.Identity()])
    for library in LIBRARIES:
        with pytest.raises(AssertionError):
            library.AdaptiveLayerLoss(model, nn.Identity())
        with pytest.raises(TypeError):
            library.AdaptiveLayerLoss(nn.Linear(2, 2), nn.Identity())
    with pytest.raises(KindError, match="first module is a Identity"):
        AdaptiveLayerLoss(model, nn.Identity())


@pytest.mark.parametrize("where", ["loss", "model"])
def test_the_model_is_as_before_whatever_is_raised(where: str, batch: Callable[..., tuple[Any, list[Any]]]) -> None:
    model, features = batch(2)
    inner = losses.MultipleNegativesRankingLoss(model)
    loss = AdaptiveLayerLoss(model, inner)
    before = dict(vars(model)), dict(vars(model[0]))
    if where == "loss":
        inner.compute_loss_from_embeddings = lambda *_: 1 / 0
    else:
        features[1]["input_ids"] = features[1]["input_ids"] + 1000
    with pytest.raises((ZeroDivisionError, IndexError)):
        loss(features, None)
    assert (vars(model), vars(model[0])) == before
    assert model[0].auto_model.config.output_hidden_states is False
    _, features = batch(3)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    losses.MultipleNegativesRankingLoss(model)(features, None)
    assert len(calls) == 2, "columns share a forward pass again"


def test_a_gradient_cache_is_warned_of(batch: Callable[..., tuple[Any, list[Any]]]) -> None:
    model, _ = batch()
    for library in LIBRARIES:
        inner = library.CachedMultipleNegativesRankingLoss(model)
        message = "AdaptiveLayerLoss is not compatible with "
        with pytest.warns(UserWarning, match=f"{message}CachedMultipleNegativesRankingLoss"):
            library.AdaptiveLayerLoss(model, inner)
        with pytest.warns(UserWarning, match=f"{message}MatryoshkaLoss"):
            library.Matryoshka2dLoss(model, inner, DIMS)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            library.AdaptiveLayerLoss(model, library.MegaBatchMarginLoss(model, use_mini_batched_version=False))


@pytest.mark.parametrize("weighting", ["cubic", None, 3])
def test_unknown_weightings_are_refused(weighting: Any, batch: Callable[..., tuple[Any, list[Any]]]) -> None:
    model, _ = batch()
    for library in LIBRARIES:
        with pytest.raises(ValueError, match="layer_weighting must be"):
            library.AdaptiveLayerLoss(model, nn.Identity(), layer_weighting=weighting)
    with pytest.raises(InputError):
        Matryoshka2dLoss(model, nn.Identity(), DIMS, layer_weighting=weighting)


def cubic(layer: int) -> float:
    return 1.0 + layer**3


@pytest.mark.parametrize("weighting", ["uniform", "log", "linear", cubic, type("Weighting", (), {"__call__": max})()])
def test_settings_are_the_oracles(weighting: Any, batch: Callable[..., tuple[Any, list[Any]]]) -> None:
    model, _ = batch()
    for name, dims in (("AdaptiveLayerLoss", ()), ("Matryoshka2dLoss", (DIMS, [1, 2, 3]))):
        for options in ((), (3, 0.5, 2.0, 0.1, 0.7) if not dims else (3, 2, 0.5, 2.0, 0.1, 0.7)):
            ours, theirs = (
                getattr(library, name)(
                    model, library.MultipleNegativesRankingLoss(model), *dims, *options, layer_weighting=weighting
                )
                for library in LIBRARIES
            )
            assert list(ours.get_config_dict().items()) == list(theirs.get_config_dict().items())
            assert ours.citation.split(",")[0] == theirs.citation.split(",")[0]
            assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
            if weighting in ("uniform", "log", "linear"):
                assert [ours.get_layer_weight(i) for i in range(5)] == [theirs.get_layer_weight(i) for i in range(5)]
    assert issubclass(Matryoshka2dLoss, AdaptiveLayerLoss)
    assert isinstance(ours.loss, losses.MatryoshkaLoss)


def test_copies_and_pickles(batch: Callable[..., tuple[Any, list[Any]]]) -> None:
    model, features = batch()
    loss = Matryoshka2dLoss(model.eval(), losses.MultipleNegativesRankingLoss(model), DIMS)
    twins = copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))
    random.seed(1)
    value = loss(features)
    for twin in twins:
        random.seed(1)
        assert torch.equal(twin(features), value)
