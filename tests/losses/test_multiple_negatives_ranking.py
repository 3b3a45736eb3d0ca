"""The ranking loss against sentence-transformers' class of the same name: values, gradients, options, behaviour."""

import copy
import functools
import itertools
import logging
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tileloss
from tileloss import similarity as ours
from tileloss.errors import InputError, ShapeError
from tileloss.functional import ContrastiveStats, contrastive_loss, contrastive_loss_with_stats
from tileloss.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss, in_batch
from tileloss.reference.contrastive import Seen
from tileloss.spec import DIRECTIONS

oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
util = pytest.importorskip("sentence_transformers.util")

SYMMETRIC = ("query_to_doc", "doc_to_query")
BLOCKS = [DIRECTIONS[:1] + more for n in range(4) for more in itertools.combinations(DIRECTIONS[1:], n)]
OBJECTIVES = [(directions, "joint") for directions in BLOCKS] + [
    (("query_to_doc",), "per_direction"),
    (SYMMETRIC, "per_direction"),
]
HARDNESS = [(None, 0.0), ("in_batch_negatives", 3.0), ("hard_negatives", 3.0), ("all_negatives", 2.0)]
# batch, hard negatives, dimension; every hardness meets half of them
SHAPES = [(1, 1, 3), (2, 0, 65), (33, 1, 3), (33, 4, 65), (2, 4, 1), (33, 0, 3), (1, 4, 65), (20, 1, 1)]
SIMILARITIES = ["cos_sim", "dot_score", "euclidean_sim", "manhattan_sim"]


class Identity(nn.Module):
    """A model whose features are its embeddings already."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features


def columns(size: int, negatives: int, width: int, dtype: torch.dtype = torch.double) -> list[Tensor]:
    return [torch.randn(size, width).to(dtype) for _ in range(2 + negatives)]


def value_and_gradients(kind: type, embeddings: list[Tensor], scale: float, **options: Any) -> list[Tensor]:
    """Loss, the gradient of every column, and that of a tensor scale."""
    leaves = [x.clone().requires_grad_() for x in embeddings]
    temperature = torch.tensor(
        scale, dtype=torch.promote_types(embeddings[0].dtype, torch.float32), requires_grad=True
    )
    value = kind(Identity(), scale=temperature, **options).compute_loss_from_embeddings(leaves, None)
    return [value.detach(), *torch.autograd.grad(value, [*leaves, temperature])]


def slope(embeddings: list[Tensor], scale: float, **options: Any) -> Tensor:
    """The derivative of the oracle's value by its scale, by central differences of fourth order.

    Its own gradient is nan wherever a row masks itself: zero times the minus infinity that it wrote before scaling.
    """
    step = 1e-3
    at = [
        oracle.MultipleNegativesRankingLoss(
            Identity(), scale=scale + k * step, **options
        ).compute_loss_from_embeddings(embeddings, None)
        for k in (-2, -1, 1, 2)
    ]
    return (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * step)


def compare(embeddings: list[Tensor], scale: float, tolerance: float, floor: float, **options: Any) -> None:
    found = value_and_gradients(MultipleNegativesRankingLoss, embeddings, scale, **options)
    expected = value_and_gradients(oracle.MultipleNegativesRankingLoss, embeddings, scale, **options)
    about = (len(embeddings[0]), len(embeddings) - 2, embeddings[0].shape[1], options)
    if expected[-1].isnan():
        expected[-1] = slope([x.double() for x in embeddings], scale, **options)
    for part, (a, b) in enumerate(zip(found, expected, strict=True)):
        limit = max(tolerance, 1e-7) if part == len(found) - 1 else tolerance  # of the scale: finite differences
        assert (a - b).norm() <= limit * b.norm() + tolerance * floor, (part, about)


@pytest.mark.parametrize(("directions", "partition"), OBJECTIVES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_float64_agrees_to_1e_8(similarity: str, directions: tuple[str, ...], partition: str, backend: str) -> None:
    torch.manual_seed(0)
    fixed = {"directions": directions, "partition_mode": partition, "similarity_fct": getattr(util, similarity)}
    for turn, (mode, strength) in enumerate(HARDNESS):
        for shape in SHAPES[turn % 2 :: 2]:
            compare(columns(*shape), 3.0, 1e-8, 1e-3, hardness_mode=mode, hardness_strength=strength, **fixed)


@pytest.mark.parametrize(("directions", "partition"), OBJECTIVES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_float32_agrees_to_2e_4(similarity: str, directions: tuple[str, ...], partition: str, backend: str) -> None:
    torch.manual_seed(0)
    fixed = {"directions": directions, "partition_mode": partition, "similarity_fct": getattr(util, similarity)}
    scale = {"cos_sim": 20.0, "dot_score": 0.5, "euclidean_sim": 1.0, "manhattan_sim": 0.3}[similarity]
    for mode, strength in HARDNESS[::3]:
        embeddings = columns(33, 1, 16, torch.float32)
        compare(embeddings, scale, 2e-4, 1e-2, hardness_mode=mode, hardness_strength=strength, **fixed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_narrow_embeddings(dtype: torch.dtype, similarity: str, backend: str) -> None:
    """A float32 loss, gradients in the embeddings' dtype, equal to the oracle's within that dtype's rounding."""
    torch.manual_seed(0)
    embeddings = columns(33, 1, 16, dtype)
    options = {"similarity_fct": getattr(util, similarity), "directions": DIRECTIONS}
    found = value_and_gradients(MultipleNegativesRankingLoss, embeddings, 1.0, **options)
    expected = value_and_gradients(oracle.MultipleNegativesRankingLoss, embeddings, 1.0, **options)
    assert [x.dtype for x in found] == [x.dtype for x in expected] == [torch.float32, *[dtype] * 3, torch.float32]
    assert found[0].item() == pytest.approx(expected[0].item(), rel=2e-4)
    for a, b in zip(found[1:-1], expected[1:-1], strict=True):
        assert (a - b).float().norm() <= 2 * torch.finfo(dtype).eps * b.float().norm()


def test_zero_rows_and_expanded_columns(backend: str) -> None:
    torch.manual_seed(0)
    query, positive, negative = columns(9, 1, 5)
    query[3], positive[4] = 0.0, 0.0
    for directions in (("query_to_doc",), DIRECTIONS):
        compare([query, positive, negative], 3.0, 1e-8, 1e-3, directions=directions)
        compare([query.T.contiguous().T, positive, negative[:1].expand(9, 5)], 3.0, 1e-8, 1e-3, directions=directions)


@pytest.mark.parametrize("directions", [("query_to_doc",), SYMMETRIC])
def test_more_docs_than_queries_are_more_negatives(directions: tuple[str, ...], backend: str) -> None:
    torch.manual_seed(0)
    query, positive, negative = columns(9, 1, 5)
    compare([query[:6], positive, negative[:4]], 3.0, 1e-8, 1e-3, directions=directions)
    idle = {"hardness_mode": "all_negatives", "hardness_strength": 0.0}
    compare([query[:6], positive, negative[:4]], 3.0, 1e-8, 1e-3, directions=directions, **idle)


def test_degenerate_batches(backend: str) -> None:
    one, two = torch.randn(1, 4), torch.randn(1, 4)
    for options in ({}, {"directions": SYMMETRIC}, {"directions": DIRECTIONS}):
        found, expected = (
            kind(Identity(), **options).compute_loss_from_embeddings([one, two], None)
            for kind in (MultipleNegativesRankingLoss, oracle.MultipleNegativesRankingLoss)
        )
        torch.testing.assert_close(found, expected)


def test_empty_batch_is_nan() -> None:
    for kind in (MultipleNegativesRankingLoss, oracle.MultipleNegativesRankingLoss):
        assert kind(Identity()).compute_loss_from_embeddings([torch.randn(0, 4)] * 2, None).isnan()


WRONG = [
    ({"scale": 0.0}, "Scale must be a positive value."),
    ({"scale": -2.0}, "Scale must be a positive value."),
    ({"scale": float("nan")}, "Scale must be a positive value."),
    ({"scale": torch.tensor(-1.0)}, "Scale must be a positive value."),
    ({"directions": ()}, "At least one direction must be specified."),
    ({"directions": None}, "At least one direction must be specified."),
    ({"directions": ("query_to_doc", "nowhere")}, "Invalid directions: ['nowhere']"),
    ({"directions": "query_to_doc"}, "directions"),
    ({"directions": SYMMETRIC[1:]}, "'query_to_doc' direction is required"),
    ({"partition_mode": "both"}, "partition_mode must be 'joint' or 'per_direction', got"),
    ({"partition_mode": "per_direction", "directions": DIRECTIONS}, "partition_mode='per_direction'"),
    ({"hardness_mode": "hardest"}, "hardness_mode must be one of"),
    ({"hardness_mode": "all_negatives", "hardness_strength": -1.0}, "hardness_strength must be non-negative"),
    ({"hardness_strength": -1.0}, "hardness_strength must be non-negative"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_constructor_refuses_what_the_oracle_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        oracle.MultipleNegativesRankingLoss(Identity(), **options)
    with pytest.raises(InputError, match=re.escape(message)):
        MultipleNegativesRankingLoss(Identity(), **options)


def test_calls_refuse_what_the_oracle_refuses() -> None:
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    hard = {"hardness_mode": "all_negatives", "hardness_strength": 1.0}
    cases: list[tuple[list[Tensor], dict[str, Any], str]] = [
        ([], {}, "Expected at least 2 embeddings, got 0"),
        ([a], {}, "Expected at least 2 embeddings, got 1"),
        ([a, b[:3]], {}, "There are 4 queries but 3 positives"),
        ([a, b[:, :2]], {}, "width"),
        ([a, b, b[:, :2]], {}, "different widths"),
        ([a.double(), b], {}, "dtype"),
        ([a, b, b[:3]], {"directions": DIRECTIONS}, "in every column"),
        ([a, b, b[:3]], hard, "in every column"),
        ([a, torch.cat([b, b])], hard, "in every column"),
    ]
    for embeddings, options, message in cases:
        with pytest.raises((ValueError, RuntimeError, IndexError)) as theirs:
            oracle.MultipleNegativesRankingLoss(Identity(), **options).compute_loss_from_embeddings(embeddings, None)
        with pytest.raises(type(theirs.value), match=message):
            MultipleNegativesRankingLoss(Identity(), **options).compute_loss_from_embeddings(embeddings, None)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_feature_dicts(count: int) -> None:
    features = [{"sentence_embedding": torch.randn(4, 3)}] * count
    with pytest.raises(ShapeError, match=f"Expected at least 2 embeddings, got {count}"):
        MultipleNegativesRankingLoss(Identity())(features, None)


def test_hardness_without_strength_warns_as_the_oracle_does(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loss = MultipleNegativesRankingLoss(Identity(), hardness_mode="all_negatives")
    assert [record.name for record in caplog.records] == ["tileloss.losses.multiple_negatives_ranking"]
    assert "hardness_mode='all_negatives'" in caplog.text
    assert "hardness_strength=0.0" in caplog.text
    embeddings = columns(5, 1, 3)
    torch.testing.assert_close(
        loss.compute_loss_from_embeddings(embeddings),
        MultipleNegativesRankingLoss(Identity()).compute_loss_from_embeddings(embeddings),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 5, "similarity_fct": util.dot_score},
        {"similarity_fct": functools.partial(util.cos_sim)},
        {"similarity_fct": nn.CosineSimilarity()},
        {"directions": list(SYMMETRIC), "partition_mode": "per_direction"},
        {"directions": DIRECTIONS, "hardness_mode": "hard_negatives", "hardness_strength": 2.0},
        {"gather_across_devices": True},
    ],
)
def test_settings_are_the_oracles(options: dict[str, Any]) -> None:
    loss, theirs = (
        kind(Identity(), **options) for kind in (MultipleNegativesRankingLoss, oracle.MultipleNegativesRankingLoss)
    )
    assert loss.get_config_dict() == theirs.get_config_dict()
    assert list(loss.get_config_dict()) == list(theirs.get_config_dict())
    assert loss.temperature == theirs.temperature == 1.0 / loss.scale
    assert re.search(r"@misc\{(\w+),", loss.citation)[1] == re.search(r"@misc\{(\w+),", theirs.citation)[1]  # type: ignore[index]
    for name in (*theirs.get_config_dict(), "model"):
        assert hasattr(loss, name)


def test_default_settings_are_the_oracles() -> None:
    assert MultipleNegativesRankingLoss(Identity()).get_config_dict()["similarity_fct"] == "cos_sim"
    loss = MultipleNegativesRankingLoss(Identity(), 10.0, ours.dot_score, False, SYMMETRIC, "joint", None, 0.0)
    theirs = oracle.MultipleNegativesRankingLoss(
        Identity(), 10.0, util.dot_score, False, SYMMETRIC, "joint", None, 0.0
    )
    assert loss.get_config_dict() == theirs.get_config_dict()


def test_model_and_parameter_scale_are_trained() -> None:
    model, scale = nn.Linear(3, 3), nn.Parameter(torch.tensor(20.0))
    names = dict(MultipleNegativesRankingLoss(model, scale=scale).named_parameters())
    assert names.keys() == {"scale", "model.weight", "model.bias"}


def test_labels_are_ignored(backend: str) -> None:
    embeddings = columns(5, 1, 3)
    loss = MultipleNegativesRankingLoss(Identity())
    plain = loss.compute_loss_from_embeddings(embeddings)
    for labels in (None, torch.zeros(5), torch.zeros(3, 7), "anything"):
        assert torch.equal(loss.compute_loss_from_embeddings(embeddings, labels), plain)  # type: ignore[arg-type]


def test_same_labels_are_excluded_when_asked(backend: str) -> None:
    embeddings, labels = columns(9, 1, 3), torch.arange(9) // 2
    loss = MultipleNegativesRankingLoss(Identity(), exclude_same_label=True, directions=SYMMETRIC)
    found = loss.compute_loss_from_embeddings(embeddings, labels)
    query, *docs = embeddings
    torch.testing.assert_close(found, contrastive_loss(query, torch.cat(docs), directions=SYMMETRIC, exclude=labels))
    torch.testing.assert_close(found, loss.compute_loss_from_embeddings(embeddings, labels[:, None]))
    assert found < MultipleNegativesRankingLoss(Identity(), directions=SYMMETRIC).compute_loss_from_embeddings(
        embeddings
    )
    for labels_, message in ((None, "needs labels"), (labels[:4], "one id for each of the 9 rows, got 4")):
        with pytest.raises(InputError, match=message):
            loss.compute_loss_from_embeddings(embeddings, labels_)


def test_statistics_are_those_of_the_last_call(backend: str) -> None:
    loss = MultipleNegativesRankingLoss(Identity())
    assert loss.stats is None
    query = torch.nn.functional.normalize(torch.randn(9, 32))
    loss.compute_loss_from_embeddings([query, query.clone()])
    assert isinstance(loss.stats, ContrastiveStats)
    assert loss.stats.accuracy == 1.0
    assert loss.stats.positive_similarity.item() == pytest.approx(1.0)
    loss.compute_loss_from_embeddings([query, -query])
    assert loss.stats.positive_similarity.item() == pytest.approx(-1.0)


@pytest.mark.parametrize("kept", [0, 1000])
def test_statistics_of_a_small_batch_are_made_when_they_are_asked_for(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From similarities that are kept without their graph, until the next call, and while they are few."""
    monkeypatch.setattr(in_batch, "_KEPT", kept)
    made = []
    statistics = Seen.statistics
    monkeypatch.setattr(Seen, "statistics", lambda seen: made.append(seen) or statistics(seen))
    query, *docs = (x.requires_grad_() for x in columns(9, 2, 4))
    loss = MultipleNegativesRankingLoss(Identity(), directions=SYMMETRIC)
    loss.compute_loss_from_embeddings([query, *docs]).backward()
    assert len(made) == (kept < 9 * 27)
    stats = loss.stats
    assert len(made) == 1
    assert not any(x.requires_grad for x in (*stats, made[0].similarities))
    torch.testing.assert_close(stats, contrastive_loss_with_stats(query, torch.cat(docs), directions=SYMMETRIC)[1])
    made[0].similarities.neg_()  # as the replay of a CUDA graph writes there
    assert (loss.stats == stats) == (kept == 0)
    loss.stats = None
    assert loss.stats is None


def test_forward_reads_the_models_embeddings(backend: str) -> None:
    torch.manual_seed(0)
    embeddings = columns(6, 2, 4)
    features = [{"sentence_embedding": x} for x in embeddings]
    loss, theirs = (kind(Identity()) for kind in (MultipleNegativesRankingLoss, oracle.MultipleNegativesRankingLoss))
    torch.testing.assert_close(loss(features, None), theirs(features, None))
    torch.testing.assert_close(loss(iter(features)), theirs(features, None))


def test_copies_and_pickles() -> None:
    loss = MultipleNegativesRankingLoss(Identity(), directions=SYMMETRIC)
    embeddings = columns(5, 0, 3)
    value = loss.compute_loss_from_embeddings(embeddings)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin.compute_loss_from_embeddings(embeddings), value)


def test_gathering_in_one_process_changes_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tileloss.distributed, "_warned", False)
    embeddings = columns(5, 0, 3)
    with caplog.at_level(logging.WARNING):
        found = MultipleNegativesRankingLoss(Identity(), gather_across_devices=True).compute_loss_from_embeddings(
            embeddings
        )
    assert "process group" in caplog.text
    torch.testing.assert_close(
        found, MultipleNegativesRankingLoss(Identity()).compute_loss_from_embeddings(embeddings)
    )


@pytest.mark.parametrize("loss", [MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss])
def test_only_a_way_to_gather_that_exists_is_taken(loss: type) -> None:
    for given in (True, False, "auto", "gather", "ring"):
        assert loss(Identity(), gather_across_devices=given).get_config_dict()["gather_across_devices"] == given
    with pytest.raises(InputError, match=r"True, False or one of .* got 'star'"):
        loss(Identity(), gather_across_devices="star")


def test_replacing_an_attribute_counts_at_the_next_call(backend: str) -> None:
    embeddings = columns(5, 0, 3)
    loss = MultipleNegativesRankingLoss(Identity())
    loss.scale, loss.similarity_fct = 2.0, util.dot_score
    expected = MultipleNegativesRankingLoss(Identity(), scale=2.0, similarity_fct=ours.dot_score)
    torch.testing.assert_close(
        loss.compute_loss_from_embeddings(embeddings), expected.compute_loss_from_embeddings(embeddings)
    )


def test_a_similarity_of_ones_own_is_the_oracles_too() -> None:
    def shifted(a: Tensor, b: Tensor) -> Tensor:
        return util.cos_sim(a, b) - 0.1 * a.norm(dim=1, keepdim=True)

    torch.manual_seed(0)
    for similarity in (shifted, ours.rowwise(functools.partial(shifted))):
        for name in ("reference", "tiled") if similarity is not shifted else ("reference",):
            with tileloss.use_backend(name):
                compare(columns(9, 1, 4), 3.0, 1e-8, 1e-3, similarity_fct=similarity, directions=DIRECTIONS)
