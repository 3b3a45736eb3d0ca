"""The cached ranking loss against sentence-transformers' class and against our loss without a cache."""

import copy
import functools
import gc
import logging
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tileloss import similarity as ours
from tileloss.bench.measure import cpu_peak
from tileloss.errors import InputError, ShapeError
from tileloss.gradcache import GradCache
from tileloss.losses import (
    CachedMultipleNegativesRankingLoss,
    CachedMultipleNegativesSymmetricRankingLoss,
    MultipleNegativesRankingLoss,
)
from tileloss.spec import DIRECTIONS

oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
util = pytest.importorskip("sentence_transformers.util")

SYMMETRIC = ("query_to_doc", "doc_to_query")
KINDS = (CachedMultipleNegativesRankingLoss, oracle.CachedMultipleNegativesRankingLoss)
OBJECTIVES = [
    {},
    {"directions": SYMMETRIC},
    {"directions": SYMMETRIC, "partition_mode": "per_direction", "mini_batch_num_tokens": 40},
    {"directions": DIRECTIONS, "hardness_mode": "in_batch_negatives", "hardness_strength": 3.0},
    {"hardness_mode": "hard_negatives", "hardness_strength": 3.0},
    {"similarity_fct": util.dot_score, "scale": 0.5, "mini_batch_size": 1},
    {"similarity_fct": util.euclidean_sim, "scale": 2.0, "mini_batch_size": 100},
    {"similarity_fct": lambda a, b: util.cos_sim(a, b) - 0.1 * a.norm(dim=1, keepdim=True)},
]


class Identity(nn.Module):
    """A model whose features are its embeddings already."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return dict(features)


def identity() -> nn.Module:
    return nn.Sequential(Identity())  # the oracle looks at a model's first module


def vectors(size: int, columns: int, width: int = 5, dtype: torch.dtype = torch.double) -> list[dict[str, Tensor]]:
    return [{"sentence_embedding": torch.randn(size, width).to(dtype).requires_grad_()} for _ in range(columns)]


def train_once(loss: nn.Module, features: list[dict[str, Any]], weight: float = 1.0) -> list[Tensor]:
    """The value of one step from a fixed seed, and the gradients of the parameters, as in mixed precision training."""
    torch.manual_seed(2)
    loss.zero_grad()
    value = loss([dict(x) for x in features], None)
    (value * weight).backward()
    return [value.detach(), *(p.grad for p in loss.parameters() if p.grad is not None)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    largest = max(x.norm() for x in expected[1:])
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * (b.norm() + 1e-3 * largest)


@pytest.mark.parametrize("options", OBJECTIVES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-8), (torch.float32, 2e-4)], ids=str)
def test_it_trains_a_transformer_with_dropout_as_the_oracle_does(
    options: dict[str, Any],
    dtype: torch.dtype,
    tolerance: float,
    tiny_encoder: Callable[[], Any],
    texts: Callable[..., list[str]],
    backend: str,
) -> None:
    if backend == "tiled" and getattr(options.get("similarity_fct"), "__name__", "") == "<lambda>":
        pytest.skip("a similarity of the user's own runs materialised")
    results = []
    for kind in KINDS:
        model = tiny_encoder().to(dtype)
        features = [model.preprocess(texts(23, seed)) for seed in range(3)]
        results.append(train_once(kind(model, **{"mini_batch_size": 6, **options}), features))
    assert_close(*results, tolerance)


@pytest.mark.parametrize("options", [{}, {"directions": DIRECTIONS}], ids=str)
def test_it_is_the_loss_without_a_cache(
    options: dict[str, Any], tiny_encoder: Callable[[], Any], texts: Callable[..., list[str]], backend: str
) -> None:
    """Dropout is drawn in another order there, so without it."""
    model = tiny_encoder().double().eval()
    features = [model.preprocess(texts(23, seed)) for seed in range(3)]
    found = train_once(CachedMultipleNegativesRankingLoss(model, mini_batch_size=6, **options), features)
    found = [x.clone() for x in found]
    assert_close(found, train_once(MultipleNegativesRankingLoss(model, **options), features), 1e-8)


def test_statistics_and_excluded_labels_are_those_of_the_loss_without_a_cache(backend: str) -> None:
    torch.manual_seed(0)
    features, labels = vectors(9, 3), torch.arange(9) // 2
    loss = CachedMultipleNegativesRankingLoss(identity(), mini_batch_size=4, exclude_same_label=True)
    assert loss.stats is None
    plain = MultipleNegativesRankingLoss(identity(), exclude_same_label=True)
    value, expected = loss(features, labels), plain(features, labels)
    torch.testing.assert_close(value.detach(), expected.detach())
    assert loss.stats == plain.stats is not None
    value.backward()
    embeddings = [x["sentence_embedding"] for x in features]
    for x, gradient in zip(embeddings, torch.autograd.grad(expected, embeddings), strict=True):
        torch.testing.assert_close(x.grad, gradient)
    with pytest.raises(InputError, match="needs labels"):
        loss(features, None)
    loss.exclude_same_label = False
    assert loss(features, None) > value


@pytest.mark.parametrize("registered", [True, False])
def test_a_scale_is_trained_and_scaled_with_the_loss(registered: bool, backend: str) -> None:
    """The oracle gives a scale its gradient in the forward, unscaled; that one is right for a weight of one only."""
    torch.manual_seed(0)
    features = vectors(9, 2)
    scale = nn.Parameter(torch.tensor(5.0)) if registered else torch.tensor(5.0, requires_grad=True)
    loss = CachedMultipleNegativesRankingLoss(identity(), scale=scale, mini_batch_size=4)
    assert ("loss.scale" in dict(loss.named_parameters())) is registered
    scale.grad = torch.tensor(1.0)
    value = loss(features)
    assert scale.grad == 1.0, "not before the backward"
    (value / 4).backward()
    plain = MultipleNegativesRankingLoss(identity(), scale=scale)(features)
    (expected,) = torch.autograd.grad(plain / 4, scale)
    torch.testing.assert_close(scale.grad, 1.0 + expected)


def test_a_computed_scale_is_refused() -> None:
    logarithm = torch.zeros((), requires_grad=True)
    with pytest.raises(InputError, match="must be a leaf"):
        CachedMultipleNegativesRankingLoss(identity(), scale=logarithm.exp())(vectors(5, 2))


def test_settings_write_through_to_the_inner_loss() -> None:
    class Similarity(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return util.dot_score(a, b)

    similarity = Similarity()
    for kind in KINDS:
        loss = kind(identity())
        for name, value in {
            "scale": 3.0, "similarity_fct": similarity, "gather_across_devices": True, "directions": SYMMETRIC,
            "partition_mode": "per_direction", "hardness_mode": "all_negatives", "hardness_strength": 2.0,
        }.items():  # fmt: skip
            setattr(loss, name, value)
            assert getattr(loss, name) is value
            assert getattr(loss.loss, name) is value
        assert {name for name, _ in loss.named_children()} == {"model", "loss"}
        assert loss.temperature == 1 / 3
        loss.mini_batch_size = 2
        assert loss.mini_batch_size == 2
        assert not hasattr(loss.loss, "mini_batch_size")
    loss = CachedMultipleNegativesRankingLoss(identity())
    loss.scale = nn.Parameter(torch.tensor(2.0))
    assert dict(loss.named_parameters()).keys() == {"loss.scale"}


@pytest.mark.parametrize(
    "options",
    [
        (),
        (5, util.dot_score, 7, 100, True, SYMMETRIC, "per_direction", True, "hard_negatives", 2.0),
        (5, functools.partial(util.cos_sim), 7, None, False, list(SYMMETRIC)),
    ],
)
def test_settings_are_the_oracles(options: tuple[Any, ...]) -> None:
    loss, theirs = (kind(identity(), *options) for kind in KINDS)
    assert list(loss.get_config_dict().items()) == list(theirs.get_config_dict().items())
    assert loss.citation.split(",")[0] == theirs.citation.split(",")[0]
    assert loss.uses_gradient_cache is theirs.uses_gradient_cache is True
    for name in ("mini_batch_size", "mini_batch_num_tokens", "show_progress_bar", "temperature"):
        assert getattr(loss, name) == getattr(theirs, name)
    assert [name for name, _ in loss.named_children()] == [name for name, _ in theirs.named_children()]
    assert isinstance(loss, GradCache)
    assert isinstance(loss.loss, MultipleNegativesRankingLoss)


WRONG = [
    ({"scale": 0.0}, "Scale must be a positive value."),
    ({"directions": ()}, "At least one direction must be specified."),
    ({"partition_mode": "both"}, "partition_mode must be"),
    ({"hardness_strength": -1.0}, "hardness_strength must be non-negative"),
    ({"mini_batch_num_tokens": 0}, "mini_batch_num_tokens must be a positive integer or None."),
    ({"mini_batch_num_tokens": -3}, "mini_batch_num_tokens must be a positive integer or None."),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_constructor_refuses_what_the_oracle_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        oracle.CachedMultipleNegativesRankingLoss(identity(), **options)
    with pytest.raises(InputError, match=re.escape(message)):
        CachedMultipleNegativesRankingLoss(identity(), **options)


def test_models_whose_inputs_cannot_be_cut_are_refused() -> None:
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Router, StaticEmbedding
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    static = StaticEmbedding(tokenizer, embedding_weights=torch.randn(1, 4).numpy())
    router = Router.for_query_document([nn.Identity()], [static])
    for module in (static, router):
        model = st.SentenceTransformer(modules=[module], device="cpu")
        for wrapped in (model, torch.compile(model)):
            for kind in KINDS:
                message = "not compatible with a SentenceTransformer model based on a StaticEmbedding"
                with pytest.raises(ValueError, match=message):
                    kind(wrapped)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_columns(count: int) -> None:
    for kind in KINDS:
        with pytest.raises(ValueError, match=f"Expected at least 2 inputs, got {count}"):
            kind(identity())(vectors(4, count), None)
    with pytest.raises(ShapeError):
        CachedMultipleNegativesRankingLoss(identity())(vectors(4, count))


def test_calls_refuse_what_the_oracle_refuses() -> None:
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    for embeddings, options in (
        ([a[:0], b[:0]], {}),
        ([a, b[:3]], {}),
        ([a, b[:, :2]], {}),
        ([a, b], {"mini_batch_size": 0}),
        ([a, b], {"mini_batch_num_tokens": 5}),
    ):
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            oracle.CachedMultipleNegativesRankingLoss(identity(), **options)(
                [{"sentence_embedding": x} for x in embeddings], None
            )
        with pytest.raises(InputError):
            CachedMultipleNegativesRankingLoss(identity(), **options)([{"sentence_embedding": x} for x in embeddings])


def test_calculate_loss_is_the_oracles_to_those_who_call_it(backend: str) -> None:
    torch.manual_seed(0)
    columns = [torch.randn(11, 4, dtype=torch.double) for _ in range(3)]
    results = []
    for kind in KINDS:
        for with_backward in (False, True):
            reps = [[part.clone().requires_grad_() for part in x.split(4)] for x in columns]
            value = kind(identity(), mini_batch_size=3).calculate_loss(reps, None, with_backward=with_backward)
            assert value.requires_grad is not with_backward
            if not with_backward:
                value.backward()
            results.append([value.detach(), *(part.grad for parts in reps for part in parts)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("steps", [-1, 1])
def test_sentence_transformers_matryoshka_around_it(
    training: bool, steps: int, tiny_encoder: Callable[[], Any], texts: Callable[..., list[str]], backend: str
) -> None:
    import random

    results = []
    for kind in KINDS:
        model = tiny_encoder().double()
        features = [model.preprocess(texts(23, seed)) for seed in range(3)]
        loss = oracle.MatryoshkaLoss(
            model, kind(model, mini_batch_size=6), [16, 8, 3], [1.0, 0.5, 0.25], n_dims_per_step=steps
        )
        random.seed(0)
        if training:
            results.append(train_once(loss, features, weight=0.5))
        else:
            with torch.no_grad():
                results.append([loss.eval()(features, None)] * 2)
    assert_close(*results, 1e-8)


@pytest.mark.parametrize("directions", [("query_to_doc",), DIRECTIONS])
def test_memory_of_the_loss_stage_is_linear_in_the_batch(directions: tuple[str, ...], small_blocks: int) -> None:
    """Counted by the allocator; four times the batch must not take sixteen times the memory."""

    def peak(size: int) -> int:
        loss = CachedMultipleNegativesRankingLoss(identity(), directions=directions)
        reps = [[torch.randn(size // 4, 16).requires_grad_() for _ in range(4)] for _ in range(2)]
        gc.collect()
        return cpu_peak(lambda: loss.calculate_loss(reps, with_backward=True))

    small, large = peak(512), peak(2048)
    assert small > 2 * 512 * 16 * 4, "the gradients at least"
    assert large < 5 * small


def test_copies_and_pickles() -> None:
    features = vectors(5, 2)
    for options in ({"directions": SYMMETRIC}, {"scale": nn.Parameter(torch.tensor(3.0))}):
        loss = CachedMultipleNegativesRankingLoss(identity(), **options)
        value = loss(features)
        for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert torch.equal(twin(features), value)


def test_hardness_without_strength_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        CachedMultipleNegativesRankingLoss(identity(), hardness_mode="all_negatives")
    assert "hardness_strength=0.0" in caplog.text


def test_the_symmetric_class_is_both_directions(backend: str) -> None:
    features = vectors(9, 3)
    with pytest.warns(DeprecationWarning, match='directions=\\("query_to_doc", "doc_to_query"\\)'):
        loss = CachedMultipleNegativesSymmetricRankingLoss(identity(), 5.0, ours.dot_score, 4, 100, False, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = oracle.CachedMultipleNegativesSymmetricRankingLoss(
            identity(), 5.0, util.dot_score, 4, 100, False, True
        )
    assert loss.get_config_dict() == theirs.get_config_dict()
    assert loss.show_progress_bar is theirs.show_progress_bar is True
    assert isinstance(loss, CachedMultipleNegativesRankingLoss)
    for x in (loss, theirs):
        x.mini_batch_num_tokens, x.show_progress_bar = None, False
    torch.testing.assert_close(loss(features).detach(), theirs(features, None).detach())
