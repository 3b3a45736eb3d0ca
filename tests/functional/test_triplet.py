"""Mined triplet losses, value and gradient: against sentence-transformers in float64, and each backend against it."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import tileloss
from tileloss import losses
from tileloss.functional import triplet_loss, triplet_loss_with_stats
from tileloss.functional.triplet import MINING
from tileloss.reference.triplet import triplet_loss as definition

oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

STOCK = oracle.BatchHardTripletLossDistanceFunction
DISTANCES = {
    "euclidean": STOCK.euclidean_distance,
    "squared_euclidean": functools.partial(STOCK.euclidean_distance, squared=True),
    "cosine": STOCK.cosine_distance,
}
CLASSES = {
    "all": oracle.BatchAllTripletLoss,
    "hard": oracle.BatchHardTripletLoss,
    "semi_hard": oracle.BatchSemiHardTripletLoss,
}


def expected(embeddings: Tensor, labels: Tensor, mining: str, margin: Any, distance: str) -> tuple[Tensor, Tensor]:
    leaf = embeddings.detach().clone().requires_grad_()
    if margin == "soft":
        loss = oracle.BatchHardSoftMarginTripletLoss(None, DISTANCES[distance])
    else:
        loss = CLASSES[mining](None, DISTANCES[distance], margin)
    value = loss.compute_loss_from_embeddings([leaf], labels)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def found(embeddings: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = embeddings.detach().clone().requires_grad_()
    value = triplet_loss(leaf, labels, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def agree(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    assert (ours[1] - theirs[1]).norm() <= tolerance * theirs[1].norm() + 1e-12


def batch(size: int, width: int, classes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(size + width + classes)
    return torch.randn(size, width, dtype=dtype), torch.randint(0, classes, (size,))


@pytest.fixture(params=["few positives", "many positives"])
def positives(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of comparing a row with its positives, whatever their number, a few rows at a time."""
    import importlib

    mining = importlib.import_module("tileloss.tiled.mining")
    threshold = 10**6 if request.param == "few positives" else 1
    monkeypatch.setattr(mining, "_BISECT_FROM", threshold)
    monkeypatch.setattr(mining, "_SORT_FROM", threshold)
    monkeypatch.setattr(mining, "_FEW", 1e-9 if request.param == "few positives" else 1e9)
    monkeypatch.setattr(mining, "_PART", 300)


@pytest.mark.parametrize("distance", list(DISTANCES))
@pytest.mark.parametrize(
    ("mining", "margin"), [("all", 0.3), ("all", 5.0), ("hard", 0.3), ("semi_hard", 0.3), ("hard", "soft")]
)
@pytest.mark.parametrize(
    ("size", "width", "classes"), [(1, 3, 1), (2, 65, 2), (63, 65, 1), (100, 3, 7), (100, 65, 30), (257, 5, 2)]
)
def test_agrees_with_sentence_transformers(
    size: int, width: int, classes: int, mining: str, margin: Any, distance: str, backend: str, positives: None
) -> None:
    embeddings, labels = batch(size, width, classes)
    ours = found(embeddings, labels, mining=mining, margin=margin, distance=distance)
    agree(ours, expected(embeddings, labels, mining, margin, distance))


@pytest.mark.parametrize("mining", MINING)
def test_one_number_wide(mining: str, backend: str, positives: None) -> None:
    """Rows that nearly meet lose digits in any order of summation: these keep their distance."""
    embeddings, labels = (
        torch.arange(63.0, dtype=torch.float64)[torch.randperm(63)][:, None] ** 1.5,
        torch.arange(63) % 9,
    )
    options = {"mining": mining, "margin": 3.3, "distance": "euclidean"}
    agree(found(embeddings, labels, **options), expected(embeddings, labels, *options.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("mining", MINING)
def test_narrower_inputs(mining: str, distance: str, dtype: torch.dtype, backend: str, positives: None) -> None:
    """float32 sums and result whatever the input, gradients in its dtype: held against float64."""
    embeddings, labels = batch(100, 65, 12, dtype)
    options = {"mining": mining, "margin": 0.5, "distance": distance}
    value, gradient = found(embeddings, labels, **options)
    truth = expected(embeddings.double(), labels, *options.values())
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
    agree((value.double(), gradient.double()), truth, 2e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("distance", list(DISTANCES))
def test_soft_margins(mining: str, distance: str, small_blocks: int, positives: None) -> None:
    """Only the hardest triplets have an oracle with a soft margin; the sums of all are written out here."""
    embeddings, labels = batch(23, 5, 4)
    leaf = embeddings.clone().requires_grad_()
    d = DISTANCES[distance](leaf)
    terms = []
    for a in range(23):
        negatives = [n for n in range(23) if labels[n] != labels[a]]
        for p in (p for p in range(23) if labels[p] == labels[a] and p != a):
            if mining == "all":
                terms += [d[a, p] - d[a, n] for n in negatives]
            else:
                beyond = [n for n in negatives if d[a, n] > d[a, p]]
                n = min(beyond, key=lambda n: d[a, n]) if beyond else max(negatives, key=lambda n: d[a, n])
                terms.append(d[a, p] - d[a, n])
    loss = torch.nn.functional.softplus(torch.stack(terms)).mean()
    truth = loss.detach(), torch.autograd.grad(loss, leaf)[0]
    if mining == "hard":
        truth = expected(embeddings, labels, "hard", "soft", distance)
    for backend in ("reference", "tiled"):
        agree(found(embeddings, labels, mining=mining, margin="soft", distance=distance, backend=backend), truth)


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([5, -3, 5, 2**62, -3, 5, 2**62]),
        torch.tensor([0.5, -0.0, 0.5, 0.0, 1e30, 0.5, 1e30]),
        torch.tensor([True, False, True, True, False, True, False]),
        torch.tensor([3, 1, 3, 2, 1, 3, 2], dtype=torch.int8),
    ],
    ids=["huge", "float", "bool", "int8"],
)
def test_labels_of_every_kind(labels: Tensor, mining: str, backend: str) -> None:
    embeddings = batch(7, 4, 1)[0]
    options = {"mining": mining, "margin": 0.5, "distance": "euclidean"}
    truth = expected(embeddings, labels, *options.values())
    for given in (labels, labels[:, None]):
        agree(found(embeddings, given, **options), truth)


@pytest.mark.parametrize("mining", MINING)
def test_hinges_at_exactly_zero_and_ties(mining: str, backend: str, positives: None) -> None:
    """On a grid of whole numbers distances tie and hinges are exactly zero: slopes of one or half, first of equals."""
    grid = torch.cartesian_prod(*[torch.arange(3.0, dtype=torch.float64)] * 3)
    embeddings = torch.cat([grid, 7 * torch.eye(3, dtype=torch.float64)])
    labels = torch.arange(30) % 5
    for margin in (0.0, 1.0, 2.0):
        options = {"mining": mining, "margin": margin, "distance": "squared_euclidean"}
        agree(found(embeddings, labels, **options), expected(embeddings, labels, *options.values()))
    simplex = torch.eye(12, dtype=torch.float64)
    for margin in (0.0, 0.5):
        options = {"mining": mining, "margin": margin, "distance": "squared_euclidean"}
        ours = found(simplex, labels[:12], **options)
        value, gradient = expected(simplex, labels[:12], *options.values())
        if mining == "all" and margin == 0.0:
            assert gradient.norm() > 1e10, "sentence-transformers divides by 1e-16"
            gradient = torch.zeros_like(gradient)
        agree(ours, (value, gradient))


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("classes", ["one", "each its own"])
def test_degenerate_batches(mining: str, classes: str, backend: str, positives: None) -> None:
    for size in (1, 2, 9):
        embeddings = batch(size, 4, 1)[0]
        labels = torch.zeros(size) if classes == "one" else torch.arange(size)
        options = {"mining": mining, "margin": 0.5, "distance": "euclidean"}
        agree(found(embeddings, labels, **options), expected(embeddings, labels, *options.values()))


@pytest.mark.parametrize("distance", list(DISTANCES))
@pytest.mark.parametrize("mining", MINING)
def test_duplicates(mining: str, distance: str, small_blocks: int) -> None:
    """Equal rows are zero apart, of the same class or not, and no gradient is other than finite."""
    torch.manual_seed(0)
    # whole numbers, whose products are exact, so that distances which tie do so in every order of summation
    embeddings = torch.randint(-9, 9, (5, 4)).double().repeat(4, 1)
    options = {"mining": mining, "margin": 0.5, "distance": distance}
    labels = torch.arange(20) % 6
    first, second = (found(embeddings, labels, backend=name, **options) for name in ("reference", "tiled"))
    assert first[1].isfinite().all()
    assert second[1].isfinite().all()
    if distance != "cosine" or mining != "semi_hard":  # which is beyond which is there a matter of rounding
        torch.testing.assert_close(second[0], first[0], rtol=1e-8, atol=1e-8)
    if distance != "cosine":
        agree(second, first)


@pytest.mark.parametrize("mining", MINING)
def test_strides_do_not_matter(mining: str, backend: str) -> None:
    embeddings, labels = batch(40, 6, 5)
    plain = found(embeddings, labels, mining=mining, margin=0.5)
    wide = torch.randn(80, 12, dtype=torch.float64)
    wide[::2, ::2] = embeddings
    view = wide[::2, ::2].requires_grad_()
    agree((triplet_loss(view, labels, mining=mining, margin=0.5).detach(), plain[1]), plain)
    agree(found(embeddings.T.contiguous().T, labels, mining=mining, margin=0.5), plain)


@pytest.mark.parametrize("mining", MINING)
def test_permuting_the_batch_permutes_the_gradients(mining: str, backend: str) -> None:
    embeddings, labels = batch(50, 6, 5)
    order = torch.randperm(50)
    value, gradient = found(embeddings, labels, mining=mining, margin=0.5)
    agree(found(embeddings[order], labels[order], mining=mining, margin=0.5), (value, gradient[order]))


@pytest.mark.parametrize("mining", MINING)
def test_statistics(mining: str, backend: str, positives: None) -> None:
    embeddings, labels = batch(30, 6, 7)
    labels[:2] = torch.tensor([100, 101])  # two rows without a positive
    value, stats = triplet_loss_with_stats(embeddings.requires_grad_(), labels, mining=mining, margin=0.2)
    d = STOCK.euclidean_distance(embeddings.detach())
    same = labels[:, None] == labels
    positive = same & ~torch.eye(30, dtype=torch.bool)
    farthest = d.masked_fill(~positive, -1.0).amax(1)
    nearest = d.masked_fill(same, 1e9).amin(1)
    assert not any(x.requires_grad for x in stats)
    assert stats.active.dtype == torch.int64
    assert stats.hardest_positive_distance.item() == pytest.approx(farthest[positive.any(1)].mean().item(), rel=1e-6)
    assert stats.hardest_negative_distance.item() == pytest.approx(nearest.mean().item(), rel=1e-6)
    if mining == "all":
        t = d[:, :, None] - d[:, None, :] + 0.2
        valid = positive[:, :, None] & ~same[:, None, :]
        active, terms = (valid & (t > 1e-16)).sum().item(), valid.sum().item()
        assert stats.active.item() == active
        assert stats.active_share.item() == pytest.approx(active / terms, rel=1e-6)
        assert value.item() == pytest.approx((t.clamp_min(0) * valid).sum().item() / active)
    else:
        terms = 30 if mining == "hard" else positive.sum().item()
        assert stats.active_share.item() == pytest.approx(stats.active.item() / terms, rel=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_embedding_that_is_no_number_is_seen(number: float, distance: str, backend: str, positives: None) -> None:
    embeddings, labels = torch.ones(20, 2), torch.arange(20) // 4
    embeddings[7] = number
    for mining in MINING:
        assert not triplet_loss(embeddings, labels, mining=mining, distance=distance).isfinite(), mining
    # but for a lone one, since every row is at no distance from itself
    assert triplet_loss(embeddings[7:8], labels[:1], mining="hard", margin=0.5, distance=distance) == 0.5


def test_embeddings_of_no_width_are_all_alike(backend: str, positives: None) -> None:
    for mining in MINING:
        assert triplet_loss(torch.empty(8, 0), torch.arange(8) // 4, mining=mining, margin=0.5) == 0.5


def test_counts_are_exact_beyond_float32() -> None:
    """Two classes of 300: 53 million triplets, all of them active."""
    embeddings, labels = batch(600, 3, 1, torch.float32)[0], torch.arange(600) % 2
    for margin in (100.0, "soft"):
        stats = triplet_loss_with_stats(embeddings, labels, mining="all", margin=margin, backend="tiled")[1]
        assert stats.active.item() == 600 * 299 * 300


@pytest.mark.parametrize("mining", MINING)
def test_two_runs_agree_bit_by_bit(mining: str) -> None:
    embeddings, labels = batch(600, 16, 40, torch.float32)
    runs = [found(embeddings, labels, mining=mining, margin=1.0, backend="tiled") for _ in range(3)]
    for value, gradient in runs[1:]:
        assert torch.equal(value, runs[0][0])
        assert torch.equal(gradient, runs[0][1])


@pytest.mark.parametrize("mining", MINING)
def test_uninitialised_memory_is_never_read(mining: str, small_blocks: int, poisoned_empty: None) -> None:
    embeddings, labels = batch(30, 6, 7)
    truth = expected(embeddings, labels, mining, 0.5, "euclidean")
    agree(found(embeddings, labels, mining=mining, margin=0.5, backend="tiled"), truth)


@pytest.mark.parametrize("mining", MINING)
def test_a_distance_of_the_users(mining: str) -> None:
    embeddings, labels = batch(40, 6, 5)
    ours = found(embeddings, labels, mining=mining, margin=0.5, distance=lambda e: torch.cdist(e, e, p=1.0))
    loss = CLASSES[mining](None, lambda e: torch.cdist(e, e, p=1.0), 0.5)
    leaf = embeddings.clone().requires_grad_()
    value = loss.compute_loss_from_embeddings([leaf], labels)
    agree(ours, (value.detach(), torch.autograd.grad(value, leaf)[0]))
    with pytest.raises(tileloss.errors.BackendError, match="none of"):
        triplet_loss(embeddings, labels, mining=mining, distance=lambda e: torch.cdist(e, e, p=1.0), backend="tiled")


@pytest.mark.parametrize("owner", [STOCK, losses.BatchHardTripletLossDistanceFunction])
def test_stock_distances_are_recognised(owner: Any) -> None:
    from tileloss.functional.triplet import recognise_distance

    assert recognise_distance(owner.euclidean_distance) == "euclidean"
    assert recognise_distance(owner.eucledian_distance) == "euclidean"
    assert recognise_distance(owner.cosine_distance) == "cosine"
    partial = functools.partial(owner.euclidean_distance, squared=True)
    assert recognise_distance(partial) == "squared_euclidean"
    assert recognise_distance(functools.partial(owner.euclidean_distance, squared=False)) == "euclidean"
    other = functools.partial(owner.cosine_distance, something=1)
    assert recognise_distance(other) is other


def test_the_definition_takes_any_matrix() -> None:
    assert definition(torch.zeros(2, 2), torch.tensor([0, 0]), "hard", 1.5, False).loss.item() == 1.5


GOOD = torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("embeddings", "labels", "options", "kind", "message"),
    [
        (GOOD, torch.zeros(3), {}, ValueError, "4 embeddings"),
        (GOOD, torch.zeros(2, 2), {}, ValueError, "(4, 1)"),
        (GOOD, [0, 1, 0, 1], {}, ValueError, "must be a tensor"),
        (GOOD, torch.zeros(4, dtype=torch.complex64), {}, ValueError, "integers or floating-point"),
        (GOOD, torch.tensor([0.0, float("nan"), 1.0, 1.0]), {}, ValueError, "nan"),
        (GOOD, torch.zeros(4, device="meta"), {}, ValueError, "move them there"),
        (torch.zeros(0, 2), torch.zeros(0), {}, IndexError, "at least one row"),
        (torch.zeros(4), torch.zeros(4), {}, ValueError, "matrix of embeddings"),
        (torch.zeros(4, 2).long(), torch.zeros(4), {}, ValueError, "floating-point"),
        ([[1.0]], torch.zeros(1), {}, ValueError, "must be a tensor"),
        (GOOD, torch.zeros(4), {"mining": "easy"}, ValueError, "mining must be one of"),
        (GOOD, torch.zeros(4), {"margin": "hard"}, ValueError, "a number or 'soft'"),
        (GOOD, torch.zeros(4), {"margin": float("nan")}, ValueError, "finite"),
        (GOOD, torch.zeros(4), {"margin": None}, TypeError, "a finite number or 'soft', got None"),
        (GOOD, torch.zeros(4), {"margin": torch.zeros(2)}, TypeError, "a finite number or 'soft', got tensor"),
        (GOOD, torch.zeros(4), {"distance": "manhattan"}, ValueError, "distance must be one of"),
        (GOOD, torch.zeros(4), {"distance": 3}, ValueError, "distance must be one of"),
        (GOOD, torch.zeros(4), {"distance": lambda e: e}, ValueError, "(4, 4) matrix"),
    ],
)
def test_errors(embeddings: Any, labels: Any, options: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind) as error:
        triplet_loss(embeddings, labels, **options)
    assert message in str(error.value)
    assert isinstance(error.value, tileloss.errors.InputError)
