"""The mega-batch margin loss against sentence-transformers' class of the same name."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tileloss.errors import InputError, ShapeError
from tileloss.losses import MegaBatchMarginLoss

oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

SHAPES = [(1, 1, 3), (2, 2, 1), (2, 2, 65), (63, 63, 3), (100, 100, 65), (40, 57, 5)]
MARGINS = [(0.8, 0.3), (1.5, -1.5), (-1.0, 1.0)]


class Identity(nn.Module):
    """A model whose features are its embeddings already."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features


def pairs(size: int, count: int, width: int, dtype: torch.dtype = torch.double) -> list[Tensor]:
    """Anchors and positives, most of them near."""
    torch.manual_seed(0)
    anchors, positives = torch.randn(size, width), torch.randn(count, width)
    positives[:size] += anchors
    return [anchors.to(dtype), positives.to(dtype)]


def value_and_gradients(kind: type, embeddings: list[Tensor], *margins: float) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in embeddings]
    loss = kind(Identity(), *margins, use_mini_batched_version=False)
    value = loss([{"sentence_embedding": x} for x in leaves], None)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def compare(embeddings: list[Tensor], tolerance: float, *margins: float) -> None:
    found, expected = (
        value_and_gradients(kind, embeddings, *margins) for kind in (MegaBatchMarginLoss, oracle.MegaBatchMarginLoss)
    )
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).float().norm() <= tolerance * b.float().norm() + 1e-12


@pytest.mark.parametrize("margins", MARGINS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_agrees_to_1e_8(shape: tuple[int, int, int], margins: tuple[float, float], backend: str) -> None:
    compare(pairs(*shape), 1e-8, *margins)


@pytest.mark.parametrize("margins", MARGINS)
@pytest.mark.parametrize("shape", SHAPES[2:])
def test_float32_agrees_to_2e_4(shape: tuple[int, int, int], margins: tuple[float, float], backend: str) -> None:
    compare(pairs(*shape, torch.float32), 2e-4, *margins)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_embeddings(dtype: torch.dtype, backend: str) -> None:
    """A float32 loss, gradients in the embeddings' dtype, equal to the oracle's within that dtype's rounding."""
    compare(pairs(40, 40, 65, dtype), 2 * torch.finfo(dtype).eps)


def test_the_automatic_choice_agrees_at_any_size() -> None:
    for size in (20, 300):
        compare(pairs(size, size, 65), 1e-8)


def test_zero_rows_and_expanded_columns(backend: str) -> None:
    anchors, positives = pairs(9, 9, 5)
    anchors[3], positives[4] = 0.0, 0.0
    compare([anchors, positives], 1e-8)
    compare([anchors.T.contiguous().T, positives], 1e-8)


def test_similarities_at_a_margin_pull_no_gradient(backend: str) -> None:
    """Both hinges are flat where they touch zero, as torch's relu is."""
    rows = torch.eye(3, dtype=torch.double)
    compare([rows, rows], 1e-8, 1.0, 0.0)
    found = value_and_gradients(MegaBatchMarginLoss, [rows, rows], 1.0, 0.0)
    assert not any(x.any() for x in found)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_other_than_two_columns(count: int) -> None:
    features = [{"sentence_embedding": torch.randn(4, 3)}] * count
    message = rf"expects exactly 2 input columns, \(anchor, positive\), but got {count}"
    for kind in (oracle.MegaBatchMarginLoss, MegaBatchMarginLoss):
        with pytest.raises(ValueError, match=message):
            kind(Identity(), use_mini_batched_version=False)(features, None)
    with pytest.raises(ShapeError, match=message):
        MegaBatchMarginLoss(Identity(), use_mini_batched_version=False).compute_loss_from_embeddings(
            [x["sentence_embedding"] for x in features]
        )


def test_wrong_columns_are_not_embedded() -> None:
    class Model(nn.Module):
        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            raise AssertionError("work was done before the error")

    with pytest.raises(ShapeError):
        MegaBatchMarginLoss(Model(), use_mini_batched_version=False)([{}] * 3, None)


def test_calls_refuse_what_the_oracle_refuses() -> None:
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    for embeddings, message in (
        ([a[:0], b[:0]], "at least one pair"),
        ([a, b[:3]], "There are 4 queries and only 3 docs"),
        ([a, b[:, :2]], "width"),
        ([a.double(), b], "dtype"),
    ):
        features = [{"sentence_embedding": x} for x in embeddings]
        with pytest.raises((ValueError, RuntimeError, IndexError)) as theirs:
            oracle.MegaBatchMarginLoss(Identity(), use_mini_batched_version=False)(features, None)
        with pytest.raises(type(theirs.value), match=message):
            MegaBatchMarginLoss(Identity(), use_mini_batched_version=False)(features, None)


def train_once(kind: type, model: Any, features: list[dict[str, Any]], **options: Any) -> list[Tensor]:
    """The value of one step of the mini-batched form, and the gradients of the model."""
    torch.manual_seed(2)
    value = kind(model, **options)([dict(x) for x in features], None)
    assert value.is_leaf
    (value / 2).backward()
    return [value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 7}, {"mini_batch_num_tokens": 40}], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-8), (torch.float32, 2e-4)], ids=str)
def test_the_mini_batched_version_trains_as_the_oracles(
    options: dict[str, int], dtype: torch.dtype, tolerance: float, tiny_encoder: Any, texts: Any, backend: str
) -> None:
    """A transformer with dropout, in training mode; twice the batch, so that 50 is a mini-batch as well."""
    results = []
    for kind in (MegaBatchMarginLoss, oracle.MegaBatchMarginLoss):
        model = tiny_encoder().to(dtype)
        features = [model.preprocess(texts(60, seed)) for seed in (0, 1)]
        results.append(train_once(kind, model, features, **options))
    largest = max(x.norm() for x in results[1])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= tolerance * (b.norm() + 1e-3 * largest)


def test_the_mini_batched_version_is_the_whole_batchs(tiny_encoder: Any, texts: Any, backend: str) -> None:
    model = tiny_encoder().double().eval()
    features = [model.preprocess(texts(20, seed)) for seed in (0, 1)]
    _, *found = train_once(MegaBatchMarginLoss, model, features, mini_batch_size=6)
    model.zero_grad()
    (MegaBatchMarginLoss(model, use_mini_batched_version=False)(features, None) / 2).backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    largest = max(x.norm() for x in expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-8 * (b.norm() + 1e-3 * largest)


def test_wrong_columns_are_refused_before_the_cache_embeds_them() -> None:
    for kind in (MegaBatchMarginLoss, oracle.MegaBatchMarginLoss):
        with pytest.raises(ValueError, match="expects exactly 2 input columns"):
            kind(nn.Sequential(Identity()))([{}] * 3, None)
    with pytest.raises(ShapeError, match="empty"):
        MegaBatchMarginLoss(Identity())([{"sentence_embedding": torch.randn(0, 3)}] * 2, None)


def test_static_embeddings_have_no_mini_batches() -> None:
    class StaticEmbedding(nn.Identity):
        """Known by its name."""

    model = nn.Sequential(StaticEmbedding())
    with pytest.raises(InputError, match="not compatible with a SentenceTransformer model based on a StaticEmbedding"):
        MegaBatchMarginLoss(model)
    MegaBatchMarginLoss(model, use_mini_batched_version=False)


@pytest.mark.parametrize("tokens", [0, -1])
def test_mini_batch_num_tokens_must_be_positive(tokens: int) -> None:
    for kind in (oracle.MegaBatchMarginLoss, MegaBatchMarginLoss):
        with pytest.raises(ValueError, match=re.escape("mini_batch_num_tokens must be a positive integer or None.")):
            kind(Identity(), use_mini_batched_version=False, mini_batch_num_tokens=tokens)
    with pytest.raises(InputError):
        MegaBatchMarginLoss(Identity(), use_mini_batched_version=False, mini_batch_num_tokens=tokens)


@pytest.mark.parametrize("options", [(), (0.7, 0.1, False, 16, 512, True), (0.7, 0.1, True)])
def test_settings_are_the_oracles(options: tuple[Any, ...]) -> None:
    model = nn.Sequential(Identity())  # the oracle looks at a model's first module
    loss, theirs = (kind(model, *options) for kind in (MegaBatchMarginLoss, oracle.MegaBatchMarginLoss))
    assert list(loss.get_config_dict().items()) == list(theirs.get_config_dict().items())
    assert re.search(r"@\w+\{(\S+),", loss.citation)[1] == re.search(r"@\w+\{(\S+),", theirs.citation)[1]  # type: ignore[index]
    for name in (*theirs.get_config_dict(), "show_progress_bar", "uses_gradient_cache"):
        assert getattr(loss, name) == getattr(theirs, name)
    assert [name for name, _ in loss.named_children()] == [name for name, _ in theirs.named_children()]


def test_calculate_loss_takes_mini_batches(backend: str) -> None:
    results = []
    for kind in (MegaBatchMarginLoss, oracle.MegaBatchMarginLoss):
        loss = kind(Identity(), use_mini_batched_version=False, mini_batch_size=7)
        for with_backward in (False, True):
            leaves = [[part.requires_grad_() for part in x.split([5, 8, 7])] for x in pairs(20, 20, 4)]
            value = loss.calculate_loss(leaves, with_backward=with_backward)
            assert value.requires_grad is not with_backward
            if not with_backward:
                value.backward()
            results.append([value.detach(), *(part.grad for column in leaves for part in column)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_labels_are_ignored_and_margins_read_at_the_call(backend: str) -> None:
    embeddings = pairs(9, 9, 3)
    loss = MegaBatchMarginLoss(Identity(), use_mini_batched_version=False)
    plain = loss.compute_loss_from_embeddings(embeddings)
    assert torch.equal(loss.compute_loss_from_embeddings(embeddings, torch.zeros(3)), plain)
    features = [{"sentence_embedding": x} for x in embeddings]
    assert torch.equal(loss(iter(features)), plain)
    loss.positive_margin = 2.0
    assert loss.compute_loss_from_embeddings(embeddings) > plain


def test_copies_and_pickles() -> None:
    loss = MegaBatchMarginLoss(Identity(), use_mini_batched_version=False)
    embeddings = pairs(5, 5, 3)
    value = loss.compute_loss_from_embeddings(embeddings)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin.compute_loss_from_embeddings(embeddings), value)
