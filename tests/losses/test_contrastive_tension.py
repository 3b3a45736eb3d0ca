"""Contrastive tension is sentence-transformers' in value, gradients, errors, settings and batches."""

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tileloss.errors import FallbackWarning, InputError, ShapeError
from tileloss.losses import (
    ContrastiveTensionDataLoader,
    ContrastiveTensionLoss,
    ContrastiveTensionLossInBatchNegatives,
    contrastive_tension,
)

st = pytest.importorskip("sentence_transformers")
oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
util = pytest.importorskip("sentence_transformers.util")

PAIRED = (ContrastiveTensionLoss, oracle.ContrastiveTensionLoss)
IN_BATCH = (ContrastiveTensionLossInBatchNegatives, oracle.ContrastiveTensionLossInBatchNegatives)


class Scaled(nn.Module):
    """Embeddings that come with the features, each number times a weight; a copy of it embeds alike."""

    def __init__(self, width: int, dtype: torch.dtype = torch.double) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width, dtype=dtype))

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {"sentence_embedding": features["vectors"] * self.weight}


def train_once(loss: nn.Module, features: list[dict[str, Any]], labels: Tensor | None = None) -> list[Tensor]:
    """The value of one step from a fixed seed, and the gradients of all parameters."""
    torch.manual_seed(2)
    loss.zero_grad()
    value = loss([dict(x) for x in features], labels)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in loss.parameters() if p.grad is not None)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    largest = max(x.norm() for x in expected[1:])
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * (b.norm() + 1e-3 * largest)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-8), (torch.float32, 2e-4)], ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_pairs_train_two_transformers_as_the_oracle_does(
    given: bool, dtype: torch.dtype, tolerance: float, tiny_encoder: Any, texts: Any, backend: str
) -> None:
    labels = torch.tensor([[1.0], [0.0], [1.0]]).repeat(5, 1) if given else None
    results = []
    for kind in PAIRED:
        model = tiny_encoder().to(dtype)
        others = [a if place % 3 == 0 else b for place, (a, b) in enumerate(zip(texts(15), texts(15, 1), strict=True))]
        features = [model.preprocess(column) for column in (texts(15), others)]
        results.append(train_once(kind(model), features, labels))
    assert len(results[0]) > 50, "of both encoders"
    assert_close(*results, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-8), (torch.float32, 2e-4)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"scale": 3.0, "similarity_fct": util.dot_score}, {"similarity_fct": util.euclidean_sim}]
)
def test_in_batch_negatives_train_two_transformers_as_the_oracle_does(
    options: dict[str, Any], dtype: torch.dtype, tolerance: float, tiny_encoder: Any, texts: Any, backend: str
) -> None:
    results = []
    for kind in IN_BATCH:
        model = tiny_encoder().to(dtype)
        loss = kind(model, **options).to(dtype)
        results.append(train_once(loss, [model.preprocess(texts(15, seed)) for seed in range(2)]))
        assert loss.logit_scale.grad is not None
    assert_close(*results, tolerance)
    assert results[0][0].ndim == 0


def test_a_user_similarity_and_a_replaced_cross_entropy_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from tileloss import backend

    monkeypatch.setattr(backend, "_said", set())
    vectors = torch.randn(9, 4, dtype=torch.double)
    for replaced in (None, nn.CrossEntropyLoss(label_smoothing=0.2), nn.CrossEntropyLoss(reduction="sum")):
        results = []
        for kind in IN_BATCH:
            loss = kind(Scaled(4), similarity_fct=lambda a, b: util.cos_sim(a, b) - 0.1 * b.norm(dim=1)).double()
            loss.model2.weight.data += 0.5
            if replaced is not None:
                loss.cross_entropy_loss = replaced
            results.append(train_once(loss, [{"vectors": vectors}]))
        assert_close(*results, 1e-8)
    monkeypatch.setattr(backend, "_said", set())
    loss = ContrastiveTensionLossInBatchNegatives(Scaled(4))
    loss.cross_entropy_loss = nn.CrossEntropyLoss(label_smoothing=0.2)
    with pytest.warns(FallbackWarning, match="cross_entropy_loss was replaced"):
        loss([{"vectors": vectors}])


@pytest.mark.parametrize("rows", [1, 2, 63])
def test_batches_of_any_size(rows: int, backend: str) -> None:
    torch.manual_seed(0)
    vectors = [{"vectors": torch.randn(rows, 3, dtype=torch.double)} for _ in range(2)]
    labels = torch.randint(2, (rows,))
    for kinds, given in ((PAIRED, labels), (IN_BATCH, None)):
        results = []
        for kind in kinds:
            loss = kind(Scaled(3)).double()
            loss.model2.weight.data += 0.5
            results.append(train_once(loss, vectors, given))
        assert_close(*results, 1e-8)


def test_an_empty_batch_is_the_oracles() -> None:
    vectors = [{"vectors": torch.randn(0, 3)} for _ in range(2)]
    for kinds, labels in ((PAIRED, torch.zeros(0)), (IN_BATCH, None)):
        found, expected = (kind(Scaled(3, torch.float32))(vectors, labels).detach() for kind in kinds)
        torch.testing.assert_close(found, expected, equal_nan=True)


# token ids, and which of them are padding
TEXTS = [
    ([5, 6, 0, 0], [1, 1, 0, 0]),
    ([0, 5, 6, 0], [0, 1, 1, 0]),
    ([5, 6, 7, 0], [1, 1, 1, 0]),
    ([6, 5, 0, 0], [1, 1, 0, 0]),
    ([0, 0, 0, 0], [0, 0, 0, 0]),
    ([5, 6, 6, 0], [1, 1, 1, 0]),
    ([5, 0, 6, 0], [1, 1, 1, 0]),
    ([5, 6, 0, 0], [1, 1, 1, 0]),
]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("wider", [0, 2])
def test_equal_texts_are_told_by_their_tokens(masked: bool, wider: int) -> None:
    """Every row with every other: padding before and behind, none, and no text at all; in columns of two widths."""
    ids, masks = (torch.tensor(rows) for rows in zip(*TEXTS, strict=True))
    vectors = torch.randn(len(ids) ** 2, 3, dtype=torch.double)
    first = {"vectors": vectors, "input_ids": ids.repeat_interleave(len(ids), 0)}
    second = {"vectors": vectors, "input_ids": nn.functional.pad(ids, (0, wider)).repeat(len(ids), 1)}
    if masked:
        first["attention_mask"] = masks.repeat_interleave(len(ids), 0)
        second["attention_mask"] = nn.functional.pad(masks, (0, wider)).repeat(len(ids), 1)
    elif wider:
        for kind, error in zip(PAIRED, (ShapeError, RuntimeError), strict=True):
            with pytest.raises(error):
                kind(Scaled(3))([first, second])
        return
    assert_close(*(train_once(kind(Scaled(3)), [first, second]) for kind in PAIRED), 1e-8)


def test_wrong_columns_and_labels_are_refused_as_the_oracle_does() -> None:
    columns = [{"vectors": torch.randn(5, 3)} for _ in range(3)]
    short = {"vectors": torch.randn(4, 3)}
    one = torch.ones(5)
    for features, labels in (
        (columns, one), (columns[:1], one), ([columns[0], short], one), (columns[:2], torch.ones(4)),
        (columns[:2], torch.ones(5, 2)),
    ):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError)):
            oracle.ContrastiveTensionLoss(Scaled(3, torch.float32))(features, labels)
        with pytest.raises(ShapeError, match="ContrastiveTensionLoss expects"):
            ContrastiveTensionLoss(Scaled(3, torch.float32))(features, labels)
    for kind in PAIRED:
        with pytest.raises(KeyError, match="input_ids"):
            kind(Scaled(3, torch.float32))(columns[:2])
    ids = [{**x, "input_ids": torch.ones(rows, 2)} for x, rows in zip(columns[:2], (5, 4), strict=True)]
    with pytest.raises(ShapeError, match="5 texts in the first column and 4"):
        ContrastiveTensionLoss(Scaled(3, torch.float32))(ids)
    for kind in IN_BATCH:
        with pytest.raises(IndexError):
            kind(Scaled(3))([], None)
        with pytest.raises(TypeError):
            kind(Scaled(3))(iter(columns), None)
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match=r"Scale must be a positive value\."):
            ContrastiveTensionLossInBatchNegatives(Scaled(3), scale=scale)


def test_settings_are_the_oracles() -> None:
    for kinds, options in ((PAIRED, ()), (IN_BATCH, ()), (IN_BATCH, (3.0, util.dot_score))):
        ours, theirs = (kind(Scaled(3), *options) for kind in kinds)
        assert list(ours.get_config_dict().items()) == list(theirs.get_config_dict().items())
        assert ours.citation.split(",")[0] == theirs.citation.split(",")[0]
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
        assert ours.model1 is not ours.model2
    assert contrastive_tension.ContrastiveTensionDataLoader is ContrastiveTensionDataLoader


def test_a_trainer_finds_the_model_to_wrap() -> None:
    """The one to keep; its copy is another matter."""
    model, wrapped = Scaled(3), nn.Sequential(Scaled(3))
    loss = ContrastiveTensionLoss(model)
    assert loss.model is loss.model2 is model
    assert [name for name, _ in loss.named_children()] == ["model", "model1", "criterion"]
    loss.model = wrapped
    assert loss.model2 is wrapped
    assert "model2.0.weight" in dict(loss.named_parameters())


def test_narrow_embeddings() -> None:
    vectors = [{"vectors": torch.randn(9, 4).bfloat16()} for _ in range(2)]
    labels = torch.arange(9) % 2
    for kinds, dtype in ((PAIRED, torch.bfloat16), (IN_BATCH, torch.float32)):
        results = []
        for kind in kinds:
            loss = kind(Scaled(4, torch.bfloat16))
            loss.model2.weight.data += 0.5
            results.append(train_once(loss, vectors, labels))
        assert {x[0].dtype for x in results} == {dtype}
        assert_close(*results, 2e-2)


def test_copies_are_losses_of_their_own() -> None:
    vectors = [{"vectors": torch.randn(9, 4, dtype=torch.double)}] * 2
    for loss, labels in (
        (ContrastiveTensionLoss(Scaled(4)), torch.ones(9)),
        (ContrastiveTensionLossInBatchNegatives(Scaled(4)), None),
    ):
        value = loss(vectors, labels)
        assert torch.equal(copy.deepcopy(loss)(vectors, labels), value)


@pytest.mark.parametrize(("count", "size", "ratio"), [(100, 8, 8), (100, 8, 4), (61, 4, 2), (14, 8, 8), (50, 3, 1)])
def test_the_loader_makes_the_oracles_batches(count: int, size: int, ratio: int) -> None:
    passes = []
    for kind in (ContrastiveTensionDataLoader, oracle.ContrastiveTensionDataLoader):
        sentences = [f"text {i}" for i in range(count)]
        loader = kind(sentences, size, ratio)
        random.seed(0)
        batches = [[[(x.texts, x.label, x.guid) for x in batch] for batch in loader] for _ in range(2)]
        assert len(batches[0]) == len(loader)
        passes.append((batches, sentences, loader.collate_fn))
    assert passes[0] == passes[1]
    assert passes[0][1] != [f"text {i}" for i in range(count)], "the caller's list is shuffled"


def test_the_loader_refuses_sizes_that_are_no_multiple_of_the_ratio() -> None:
    for size, ratio in ((7, 8), (9, 2)):
        for kind in (ContrastiveTensionDataLoader, oracle.ContrastiveTensionDataLoader):
            with pytest.raises(ValueError, match="must be divisible by the"):
                kind([], size, ratio)
    with pytest.raises(InputError, match="a positive number"):
        ContrastiveTensionDataLoader([], 8, 0)


def test_old_training_loops_collate_our_examples(
    tiny_encoder: Callable[..., Any], texts: Callable[..., list[str]]
) -> None:
    model = tiny_encoder()
    loader = ContrastiveTensionDataLoader(texts(30), 8)
    loader.collate_fn = model.smart_batching_collate
    batches = list(loader)
    assert len(batches) == 2
    for features, labels in batches:
        assert labels.tolist() == [1] + 7 * [0]
        assert len(features) == 2
        assert contrastive_tension._are_equal(*features).tolist() == [True] + 7 * [False]
        assert ContrastiveTensionLoss(model)(features, labels).isfinite()
