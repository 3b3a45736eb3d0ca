"""The cached guided loss against sentence-transformers' class and against our loss without a cache."""

import copy
import gc
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tileloss import backend as backends
from tileloss.bench.measure import cpu_peak
from tileloss.errors import FallbackWarning, InputError, ShapeError
from tileloss.gradcache import GradCache
from tileloss.losses import CachedGISTEmbedLoss, GISTEmbedLoss

oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

KINDS = (CachedGISTEmbedLoss, oracle.CachedGISTEmbedLoss)


@pytest.fixture
def pair(tiny_encoder: Callable[..., Any], other_bert: Path) -> Callable[..., tuple[Any, Any]]:
    """Makes model and guide, equal ones every time; the guide counts the texts that it embeds."""

    def make(vocabulary: str = "same", dtype: torch.dtype = torch.double) -> tuple[Any, Any]:
        model, guide = tiny_encoder().to(dtype), tiny_encoder(other_bert).to(dtype).eval()
        if vocabulary == "same":  # the same numbers for words, and other weights
            guide[0].processor = model[0].processor
        guide.rows = []
        guide.register_forward_hook(lambda _, given, made: guide.rows.append(len(made["sentence_embedding"])))
        return model, guide

    return make


@pytest.fixture
def features(texts: Callable[..., list[str]]) -> Callable[..., list[dict[str, Any]]]:
    """Makes columns of texts that are ever more like the first."""

    def make(model: Any, rows: int, columns: int) -> list[dict[str, Any]]:
        drawn = [texts(rows, seed) for seed in range(columns)]
        return [model.preprocess([f"{a} {b}" for a, b in zip(drawn[0], column, strict=True)]) for column in drawn]

    return make


def train_once(loss: nn.Module, columns: list[dict[str, Any]], weight: float = 1.0) -> list[Tensor]:
    """The value of one step from a fixed seed, and the gradients of the model's parameters."""
    torch.manual_seed(2)
    loss.zero_grad()
    value = loss([dict(x) for x in columns], None)
    (value * weight).backward()
    assert all(p.grad is None for p in loss.guide.parameters())
    return [value.detach(), *(p.grad.clone() for p in loss.model.parameters() if p.grad is not None)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    largest = max(x.norm() for x in expected[1:])
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * (b.norm() + 1e-3 * largest)


OPTIONS = [
    (2, {}),
    (4, {"margin": 0.05, "mini_batch_num_tokens": 40}),
    (2, {"margin": 0.1, "margin_strategy": "relative", "mini_batch_size": 1}),
    (3, {"contrast_anchors": False, "mini_batch_size": 100}),
    (3, {"contrast_positives": False, "contrast_anchors": False}),
]


@pytest.mark.parametrize(("columns", "options"), OPTIONS, ids=str)
def test_it_trains_a_transformer_with_dropout_as_the_oracle_does(
    options: dict[str, Any], columns: int, pair: Any, features: Any, backend: str
) -> None:
    results = []
    for kind in KINDS:
        model, guide = pair()
        loss = kind(model, guide, **{"temperature": 0.1, "mini_batch_size": 6, **options})
        assert not loss.must_retokenize
        results.append(train_once(loss, features(model, 17, columns), weight=0.5))
        assert sum(guide.rows) == 17 * columns, "once, in the first pass"
    assert_close(*results, 1e-8)


def test_float32(pair: Any, features: Any, backend: str) -> None:
    results = []
    for kind in KINDS:
        model, guide = pair(dtype=torch.float32)
        results.append(train_once(kind(model, guide, 0.1, 6, margin=0.05), features(model, 17, 3)))
    assert_close(*results, 2e-4)


@pytest.mark.parametrize("change", ["vocabulary", "length"])
def test_texts_are_tokenised_again_for_another_guide(change: str, pair: Any, features: Any) -> None:
    results = []
    for kind in KINDS:
        model, guide = pair("other" if change == "vocabulary" else "same")
        if change == "length":
            guide[0].processor = copy.deepcopy(model[0].processor)
            guide.max_seq_length = 3
        loss = kind(model, guide, 0.1, 6)
        assert loss.must_retokenize
        results.append(train_once(loss, features(model, 17, 3)))
    assert_close(*results, 1e-8)


def test_it_is_the_loss_without_a_cache(pair: Any, features: Any, backend: str) -> None:
    """Dropout is drawn in another order there, so without it."""
    model, guide = pair()
    model.eval()
    columns = features(model, 17, 3)
    cached = CachedGISTEmbedLoss(model, guide, 0.1, 6)
    found, plain = train_once(cached, columns), GISTEmbedLoss(model, guide, 0.1)
    assert_close(found, train_once(plain, columns), 1e-8)
    torch.testing.assert_close(cached.stats, plain.stats)


def test_without_gradients_there_is_the_value_alone(pair: Any, features: Any) -> None:
    values = []
    for kind in KINDS:
        model, guide = pair()
        with torch.no_grad():
            values.append(kind(model.eval(), guide, 0.1, 6)(features(model, 9, 3), None))
        assert not values[-1].requires_grad
    torch.testing.assert_close(*values, rtol=1e-8, atol=0)


def test_the_guide_gets_features_that_the_model_has_not_written_to(pair: Any, features: Any) -> None:
    model, guide = pair()
    seen: list[set[str]] = []
    guide.register_forward_pre_hook(lambda _, given: seen.append(set(given[0])))
    CachedGISTEmbedLoss(model, guide, mini_batch_size=4)(features(model, 9, 2), None)
    assert len(seen) == 6
    assert not any("sentence_embedding" in keys for keys in seen)


def test_calculate_loss_is_the_oracles_to_those_who_call_it(pair: Any, backend: str) -> None:
    torch.manual_seed(0)
    columns, guided = ([torch.randn(11, width, dtype=torch.double) for _ in range(3)] for width in (4, 3))
    results = []
    for kind in KINDS:
        loss = kind(*pair(), temperature=0.5, mini_batch_size=3)
        reps_guided = [list(x.split(4)) for x in guided]
        for with_backward in (False, True, None):
            reps = [[part.clone().requires_grad_() for part in x.split(4)] for x in columns]
            if with_backward is None:
                value, gradients = loss.calculate_loss_and_cache_gradients(reps, reps_guided)
                assert value.is_leaf
                assert value.requires_grad
            else:
                value = loss.calculate_loss(reps, reps_guided, with_backward=with_backward)
                assert value.requires_grad is not with_backward
                if not with_backward:
                    value.backward()
                gradients = [[part.grad for part in parts] for parts in reps]
            results.append([value.detach(), *(gradient for parts in gradients for gradient in parts)])
        with pytest.raises(ValueError, match="reps and reps_guided must have the same length"):
            loss.calculate_loss(reps, reps_guided[:2])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_embed_minibatch_is_called_and_answers_as_the_oracles(
    pair: Any, features: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in KINDS:
        model, guide = pair()
        loss, passes = kind(model, guide, mini_batch_size=4), []
        embed = loss.embed_minibatch

        def spy(*args: Any, embed: Any = embed, passes: list[Any] = passes, **kwargs: Any) -> Any:
            assert not args
            result = embed(**kwargs)
            passes.append((kwargs["with_grad"], *(x is not None for x in result)))
            return result

        monkeypatch.setattr(loss, "embed_minibatch", spy)
        columns = features(model, 7, 2)
        loss(columns, None).backward()
        assert passes == [(False, True, True, True)] * 4 + [(True, True, False, False)] * 4
        reps, guided, state = next(loss.embed_minibatch_iter(columns[0], with_grad=False, copy_random_state=False))
        assert (reps.shape, guided.shape, state) == ((4, 16), (4, 16), None)


@pytest.mark.parametrize("steps", [-1, 1])
def test_sentence_transformers_matryoshka_around_it(steps: int, pair: Any, features: Any, backend: str) -> None:
    import random

    results = []
    for kind in KINDS:
        model, guide = pair()
        loss = oracle.MatryoshkaLoss(
            model, kind(model, guide, 0.1, 6), [16, 8, 3], [1.0, 0.5, 0.25], n_dims_per_step=steps
        )
        random.seed(0)
        torch.manual_seed(2)
        value = loss(features(model, 17, 3), None)
        value.backward()
        results.append([value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert_close(*results, 1e-8)


class Similarity(nn.CosineSimilarity):
    """Not the stock one any more, whatever it computes."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return 0.5 * super().forward(a, b)


@pytest.mark.parametrize(
    ("attribute", "replacement"),
    [("cross_entropy_loss", nn.CrossEntropyLoss(label_smoothing=0.1)), ("similarity_fct", Similarity(-1))],
    ids=["cross_entropy_loss", "similarity_fct"],
)
def test_a_replaced_function_is_used_and_said(
    attribute: str, replacement: nn.Module, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    columns, guided = ([torch.randn(11, width, dtype=torch.double) for _ in range(4)] for width in (4, 3))
    results = []
    for kind in KINDS:
        loss = kind(*pair(), temperature=0.5, mini_batch_size=3)
        setattr(loss, attribute, replacement)
        if attribute == "cross_entropy_loss":  # as label smoothing spreads over pairs that are ruled out
            loss.margin = -10.0
        reps = [[part.clone().requires_grad_() for part in x.split(4)] for x in columns]
        monkeypatch.setattr(backends, "_said", set())
        if kind is CachedGISTEmbedLoss:
            with pytest.warns(FallbackWarning, match="CachedGISTEmbedLoss runs materialised"):
                value = loss.calculate_loss(reps, [[x] for x in guided], with_backward=True)
        else:
            value = loss.calculate_loss(reps, [[x] for x in guided], with_backward=True)
        results.append([value, *(part.grad for parts in reps for part in parts)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_settings_are_the_oracles(pair: Any) -> None:
    for vocabulary in ("same", "other"):
        model, guide = pair(vocabulary)
        options = (model, guide, 0.1, 7, 100, True, "relative", 0.2, False, True, True)
        ours, theirs = (kind(*options) for kind in KINDS)
        assert list(ours.get_config_dict().items()) == list(theirs.get_config_dict().items())
        assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
        assert ours.must_retokenize == theirs.must_retokenize
        assert hasattr(ours, "tokenizer") == hasattr(theirs, "tokenizer")
    assert ours.uses_gradient_cache is theirs.uses_gradient_cache is True
    assert not hasattr(ours, "citation")
    assert not hasattr(theirs, "citation")
    assert isinstance(ours, GradCache)


WRONG = [
    ({"margin_strategy": "percent"}, "margin_strategy must be 'absolute' or 'relative'"),
    ({"mini_batch_num_tokens": 0}, "mini_batch_num_tokens must be a positive integer or None."),
    ({"guide": nn.Identity()}, "must have a tokenizer attribute"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message for _, message in WRONG])
def test_constructor_refuses_what_the_oracle_refuses(options: dict[str, Any], message: str, pair: Any) -> None:
    model, guide = pair()
    for kind in KINDS:
        with pytest.raises(ValueError, match=re.escape(message)):
            kind(model, **{"guide": guide, **options})
    assert issubclass(InputError, ValueError)


def test_models_whose_inputs_cannot_be_cut_are_refused(pair: Any) -> None:
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    model, guide = pair()
    static = st.SentenceTransformer(
        modules=[StaticEmbedding(model.tokenizer, embedding_weights=torch.randn(42, 4).numpy())], device="cpu"
    )
    for kind in KINDS:
        with pytest.raises(
            ValueError, match="not compatible with a SentenceTransformer model based on a StaticEmbedding"
        ):
            kind(static, guide)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_columns_are_refused_before_anything_is_embedded(count: int, pair: Any, features: Any) -> None:
    model, guide = pair()
    with pytest.raises(IndexError):
        oracle.CachedGISTEmbedLoss(model, guide)(features(model, 4, count), None)
    guide.rows.clear()
    with pytest.raises(ShapeError, match=f"Expected at least 2 inputs, got {count}"):
        CachedGISTEmbedLoss(model, guide)(features(model, 4, count), None)
    assert not guide.rows
    assert issubclass(ShapeError, IndexError)


def test_16_bits_in_16_bits_out(pair: Any) -> None:
    for kind in KINDS:
        reps = [[torch.randn(9, 4).bfloat16().requires_grad_()] for _ in range(2)]
        guided = [[torch.randn(9, 3)] for _ in range(2)]
        value, gradients = kind(*pair()).calculate_loss_and_cache_gradients(reps, guided)
        assert {value.dtype, *(gradient.dtype for parts in gradients for gradient in parts)} == {torch.bfloat16}


@pytest.mark.parametrize("replaced", [False, True])
def test_memory_of_the_loss_stage_is_linear_in_the_batch(replaced: bool, pair: Any, small_blocks: int) -> None:
    """Counted by the allocator; four times the batch must not take sixteen times the memory.

    Nor where a function was replaced, and the definition runs.
    """
    loss = CachedGISTEmbedLoss(*pair(), temperature=0.5, mini_batch_size=4)
    if replaced:
        loss.cross_entropy_loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    sizes = (64, 256) if replaced else (512, 2048)

    def peak(size: int) -> int:
        reps, guided = (
            [[torch.randn(size // 4, 16, requires_grad=own) for _ in range(4)] for _ in range(2)]
            for own in (True, False)
        )
        gc.collect()
        return cpu_peak(lambda: loss.calculate_loss(reps, guided, with_backward=True))

    small, large = map(peak, sizes)
    assert small > 2 * sizes[0] * 16 * 4, "the gradients at least"
    assert large < 5 * small


def test_copies_and_pickles(pair: Any, features: Any) -> None:
    model, guide = pair()
    guide._forward_hooks.clear()
    model.eval()
    columns = features(model, 5, 2)
    loss = CachedGISTEmbedLoss(model, guide, 0.1, mini_batch_size=4)
    value = loss([dict(x) for x in columns], None)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin([dict(x) for x in columns], None), value)
