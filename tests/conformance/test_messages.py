"""Mistakes raise the types that they raise in sentence-transformers, with the phrases that people match on."""

import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tileloss import losses

ROWS, WIDTH = 6, 16


class Bench(NamedTuple):
    """What a mistake is made with."""

    package: ModuleType
    model: Any  # a tiny text encoder
    static: Any  # a bag of words, whose features have no row for each text
    columns: list[dict[str, Any]]  # three of them
    folder: Path

    def make(self, name: str, model: Any = None, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return getattr(self.package, name)(self.model if model is None else model, **options)

    @property
    def embeddings(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(ROWS, WIDTH, generator=generator).requires_grad_() for _ in range(4)]


@pytest.fixture
def bench(tiny_encoder: Callable[..., Any], texts: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Bench]:
    tokenizers = pytest.importorskip("tokenizers")
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    static = st.SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=WIDTH)], device="cpu")
    model = tiny_encoder()
    columns = [model.preprocess(texts(ROWS, seed=column)) for column in range(3)]
    return lambda package: Bench(package, model, static, [dict(column) for column in columns], tmp_path)


def _unused_column(b: Bench) -> Any:
    class Ignoring(b.package.CachedMultipleNegativesRankingLoss):  # type: ignore[name-defined, misc]
        def calculate_loss(self, reps: Any, labels: Any = None, *, with_backward: bool = False) -> Any:
            loss = torch.cat(list(reps[0])).square().sum()
            if with_backward:
                loss.backward()
            return loss.detach()

    return Ignoring(b.model)(b.columns[:2], None)


def _wrapped_layers(b: Bench) -> Any:
    loss = b.make("AdaptiveLayerLoss", loss=b.make("MultipleNegativesRankingLoss"))
    loss.model = nn.Identity()
    return loss(b.columns[:2], None)


def _without_masks(b: Bench) -> Any:
    columns = [{"input_ids": column["input_ids"]} for column in b.columns[:2]]
    return b.make("CachedMultipleNegativesRankingLoss", mini_batch_num_tokens=4)(columns, None)


def _other_projection(b: Bench) -> Any:
    b.make("MSELoss", projection_dim=3).save_projection(b.folder / "projection.safetensors")
    return b.make("MSELoss", projection_dim=5).load_projection(b.folder / "projection.safetensors")


def _matryoshka(b: Bench, *dims: int, **options: Any) -> Any:
    return b.make("MatryoshkaLoss", loss=b.make("MultipleNegativesRankingLoss"), matryoshka_dims=list(dims), **options)


def _distil(b: Bench, columns: int, labels: Tensor, **options: Any) -> Any:
    return b.make("DistillKLDivLoss", **options).compute_loss_from_embeddings(b.embeddings[:columns], labels)


_NO_STATIC = "not compatible with a SentenceTransformer model based on a StaticEmbedding"
_NO_TOKENS = r"mini_batch_num_tokens must be a positive integer or None\."
_EMBEDDING_LABELS = {"labels": torch.zeros(ROWS, 5, WIDTH)}

ERRORS: dict[str, list[tuple[str, Callable[[Bench], Any]]]] = {
    "AdaptiveLayerLoss": [
        ("could not unwrap Identity .*stopped at Identity", _wrapped_layers),
        (
            "layer_weighting",
            lambda b: b.make(
                "AdaptiveLayerLoss", loss=b.make("MultipleNegativesRankingLoss"), layer_weighting="unheard-of"
            ),
        ),
    ],
    "CachedGISTEmbedLoss": [
        (_NO_STATIC, lambda b: b.make("CachedGISTEmbedLoss", b.static, guide=b.model)),
        (_NO_TOKENS, lambda b: b.make("CachedGISTEmbedLoss", guide=b.model, mini_batch_num_tokens=0)),
    ],
    "CachedMultipleNegativesRankingLoss": [
        (_NO_STATIC, lambda b: b.make("CachedMultipleNegativesRankingLoss", b.static)),
        (_NO_TOKENS, lambda b: b.make("CachedMultipleNegativesRankingLoss", mini_batch_num_tokens=-1)),
        (r"Scale must be a positive value\.", lambda b: b.make("CachedMultipleNegativesRankingLoss", scale=0)),
        (r"did not use input column\(s\) 1", _unused_column),
        ("neither 'cu_seq_lens_q' .*nor 'attention_mask'", _without_masks),
    ],
    "CachedMultipleNegativesSymmetricRankingLoss": [
        (_NO_STATIC, lambda b: b.make("CachedMultipleNegativesSymmetricRankingLoss", b.static)),
    ],
    "DenoisingAutoEncoderLoss": [(_NO_STATIC, lambda b: b.make("DenoisingAutoEncoderLoss", b.static))],
    "DistillKLDivLoss": [
        ("must be a positive finite number", lambda b: b.make("DistillKLDivLoss", temperature=0)),
        ("must be a positive finite number", lambda b: b.make("DistillKLDivLoss", teacher_temperature=torch.inf)),
        ("at least 3 columns", lambda b: _distil(b, 2, torch.zeros(ROWS, 1))),
        (r"teacher scores of shape \(batch_size, N\)", lambda b: _distil(b, 4, torch.zeros(ROWS, 2))),
        ("teacher scores contain NaN", lambda b: _distil(b, 4, torch.full((ROWS, 3), torch.nan))),
    ],
    "EmbedDistillLoss": [
        ("distance_metric must be one of", lambda b: b.make("EmbedDistillLoss", distance_metric="far")),
        ("pre-computed teacher embeddings", lambda b: b.make("EmbedDistillLoss")(b.columns[:2], None)),
        ("Number of label columns", lambda b: b.make("EmbedDistillLoss")(b.columns[:2], **_EMBEDDING_LABELS)),
        ("No projection layer to save", lambda b: b.make("EmbedDistillLoss").save_projection(b.folder / "x")),
    ],
    "MSELoss": [
        ("does not match the configured", _other_projection),
        ("pre-computed teacher embeddings", lambda b: b.make("MSELoss")(b.columns[:2], None)),
    ],
    "MatryoshkaLoss": [
        (r"You must provide at least one dimension in matryoshka_dims\.", _matryoshka),
        (r"All dimensions passed to a matryoshka loss must be > 0\.", lambda b: _matryoshka(b, 8, 0)),
        (
            r"matryoshka_weights must be the same length as matryoshka_dims\.",
            lambda b: _matryoshka(b, 8, 4, matryoshka_weights=[1.0]),
        ),
        (
            rf"Dimensions in matryoshka_dims cannot exceed the model's embedding dimension of {WIDTH}\.",
            lambda b: _matryoshka(b, 17),
        ),
    ],
    "MegaBatchMarginLoss": [
        (_NO_STATIC, lambda b: b.make("MegaBatchMarginLoss", b.static)),
        (_NO_TOKENS, lambda b: b.make("MegaBatchMarginLoss", mini_batch_num_tokens=0)),
        (
            r"expects exactly 2 input columns, \(anchor, positive\), but got 3",
            lambda b: b.make("MegaBatchMarginLoss")(b.columns, None),
        ),
    ],
    "MultipleNegativesRankingLoss": [
        (r"Scale must be a positive value\.", lambda b: b.make("MultipleNegativesRankingLoss", scale=-1.0)),
    ],
    "MultipleNegativesSymmetricRankingLoss": [
        (r"Scale must be a positive value\.", lambda b: b.make("MultipleNegativesSymmetricRankingLoss", scale=0.0)),
    ],
    **{
        name: [
            (
                rf"{name} expects {ROWS} labels \(one per example\)",
                lambda b, name=name: b.make(name).compute_loss_from_embeddings(b.embeddings[:2], torch.zeros(2)),
            )
        ]
        for name in (
            "AnglELoss",
            "BatchAllTripletLoss",
            "BatchHardSoftMarginTripletLoss",
            "BatchHardTripletLoss",
            "BatchSemiHardTripletLoss",
            "CoSENTLoss",
            "ContrastiveLoss",
            "CosineSimilarityLoss",
            "OnlineContrastiveLoss",
        )
    },
}


@pytest.mark.parametrize(
    ("phrase", "mistake"),
    [
        pytest.param(*error, id=f"{name}-{place}")
        for name, errors in ERRORS.items()
        if hasattr(losses, name)
        for place, error in enumerate(errors)
    ],
)
def test_mistakes_raise_the_same_with_the_phrases_of_old(
    phrase: str, mistake: Callable[[Bench], Any], bench: Callable[..., Bench], stock: ModuleType
) -> None:
    with pytest.raises(Exception, match=f"(?s){phrase}") as theirs:
        mistake(bench(stock))
    with pytest.raises(theirs.type, match=f"(?s){phrase}"):
        mistake(bench(losses))


@pytest.mark.parametrize("kind", ["ContrastiveLoss", "OnlineContrastiveLoss"])
def test_labels_that_are_not_binary_are_warned_of_once(
    kind: str, bench: Callable[..., Bench], library: ModuleType
) -> None:
    b = bench(library)
    loss = b.make(kind)
    with pytest.warns(UserWarning, match=f"{kind} expects binary labels"):
        loss.compute_loss_from_embeddings(b.embeddings[:2], torch.linspace(0, 1, ROWS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss.compute_loss_from_embeddings(b.embeddings[:2], torch.linspace(0, 1, ROWS))


@pytest.mark.parametrize(
    "inner",
    ["CachedMultipleNegativesRankingLoss", "MegaBatchMarginLoss", "CachedMultipleNegativesSymmetricRankingLoss"],
)
def test_layers_under_a_gradient_cache_are_warned_of(
    inner: str, bench: Callable[..., Bench], library: ModuleType
) -> None:
    b = bench(library)
    with pytest.warns(UserWarning, match=f"AdaptiveLayerLoss is not compatible with {inner}"):
        b.make("AdaptiveLayerLoss", loss=b.make(inner))


def test_a_teacher_too_sure_of_itself_is_logged_once(
    bench: Callable[..., Bench], library: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    b = bench(library)
    loss = b.make("DistillKLDivLoss", temperature=0.1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            loss.compute_loss_from_embeddings(b.embeddings, torch.tensor([[90.0, 0.0, -90.0]] * ROWS))
    messages = [record.getMessage() for record in caplog.records if "carry no gradient" in record.getMessage()]
    assert len(messages) == 1
    assert re.search(r"teacher_temperature=0\.1\b", messages[0])


def test_deprecated_losses_say_so_and_what_to_use(bench: Callable[..., Bench], library: ModuleType) -> None:
    b = bench(library)
    for name in ("MultipleNegativesSymmetricRankingLoss", "CachedMultipleNegativesSymmetricRankingLoss"):
        with pytest.warns(DeprecationWarning, match="MultipleNegativesRankingLoss"):
            getattr(library, name)(b.model)
