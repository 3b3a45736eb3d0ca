"""Triplet losses that mine their triplets from a labelled batch, without the matrix of distances.

The forward computes distances in blocks of rows, mines each block on the spot, and keeps a number or two for each row;
when they will be wanted, it also finds the gradients in the same walk, and the backward only scales them. The price is
that a forward whose backward is never called has done the backward's work; under `torch.no_grad` it does none of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tileloss.arguments import finite_number
from tileloss.backend import accepts_backend, choose
from tileloss.errors import InputError, ShapeError
from tileloss.functional.checks import check_labels, check_rows
from tileloss.functional.triplet_op import block_loss, materialised_loss
from tileloss.reference.triplet import Mined
from tileloss.reference.triplet import triplet_loss as definition
from tileloss.similarity import dense, up
from tileloss.tiled.mining import Classes

MINING = ("all", "hard", "semi_hard")
DISTANCES = ("euclidean", "squared_euclidean", "cosine")

# how much more the materialised form does to each distance than to a similarity of in-batch negatives, in effect: on
# two CPU cores blocks pay from about 90 rows with "all" (later for small classes, sooner for large ones) and
# "semi_hard", from about 180 with "hard"
_WORK = {"all": 8, "hard": 2, "semi_hard": 8}

_NO_CLASS = "which equals nothing, itself included: give each row the number of a class."

DistanceFn = Callable[[Tensor], Tensor]

_STOCK_CLASS = "BatchHardTripletLossDistanceFunction"
_STOCK_FUNCTIONS = {"euclidean_distance": "euclidean", "cosine_distance": "cosine"}
_STOCK_PACKAGES = ("tileloss", "sentence_transformers")


class TripletStats(NamedTuple):
    """What the loss saw on its way, each a detached 0-dim tensor on the embeddings' device.

    Attributes:
        active: int64, the terms of the loss that are above zero; with a soft margin all of them. Terms are triplets
            for "all", pairs of anchor and positive for "semi_hard", anchors for "hard".
        active_share: float32, their share of the terms that there are; nan where there are none.
        hardest_positive_distance: float32, of an anchor from its farthest positive, as a mean over the anchors that
            have one; nan where none has.
        hardest_negative_distance: float32, of an anchor from its nearest negative, likewise.
    """

    active: Tensor
    active_share: Tensor
    hardest_positive_distance: Tensor
    hardest_negative_distance: Tensor


@accepts_backend
def triplet_loss(
    embeddings: Tensor,  # (B, D)
    labels: Tensor,  # (B,) or (B, 1)
    *,
    mining: str = "all",
    margin: float | str = 5.0,
    distance: str | DistanceFn = "euclidean",
    backend: str | None = None,
) -> Tensor:
    """Texts of one class belong nearer together than texts of different classes, by a margin.

    Every row is an anchor; the other rows of its class are its positives p, rows of other classes its negatives n. The
    loss of a triplet is max(d(p) - d(n) + margin, 0). Which triplets count is the mining:

    * "all": every triplet, averaged over those with a loss above zero;
    * "hard": of each anchor the farthest positive and the nearest negative, averaged over all anchors. An anchor
      without a positive takes zero for its distance, one without a negative the distance of the farthest row;
    * "semi_hard": every pair of anchor and positive with one negative, the nearest that is farther away than the
      positive, or failing that the farthest; averaged over the pairs. Without a negative its distance is zero.

    Args:
        embeddings: (B, D) floating point, B > 0, any strides; sparse ones are made dense.
        labels: (B,) or (B, 1), the class of each row: any integers, or floats without nan; equal means the same class.
        mining: "all", "hard" or "semi_hard".
        margin: a number, or "soft": softplus(d(p) - d(n)) in the place of the hinge, for "all" averaged over every
            triplet.
        distance: "euclidean", "squared_euclidean" or "cosine" (1 - cosine), a function of
            `tileloss.losses.BatchHardTripletLossDistanceFunction` or its sentence-transformers namesake, or any
            callable (B, D) -> (B, B), which runs materialised. Euclidean distances come from a difference of squares:
            what lies within its rounding is zero, and has gradient zero.
        backend: "reference", "tiled", "triton" or "auto", for this call alone; see `tileloss.backend`.

    Returns:
        A 0-dim tensor: float64 for float64 inputs, else float32. At a hinge of exactly zero the slope is one ("all",
        "hard") or one half ("semi_hard"), and without any triplet above zero the gradient of "all" is zero. A second
        derivative goes through the materialised definition: exact, in its memory.

    Raises:
        ShapeError, DtypeError, DeviceError, InputError: for inputs that do not fit, before any work.
        BackendError: for a backend that was asked for by name and cannot run.

    Cost:
        Three GEMMs of B x B x D for forward and backward together, and O(B^2 log P) comparisons for classes of P rows;
        "hard" one GEMM and O(B D); "semi_hard" of few positives one on a CPU, and O(B D P). Memory beside inputs and
        gradients: a copy of the inputs, and blocks of some 40 MB on a CPU and 224 MB on a GPU. Materialised, "all"
        holds several times B P B numbers.

    Source:
        Hermans, Beyer, Leibe 2017 (arXiv 1703.07737): all and hard, hinge and soft margin; Schroff, Kalenichenko,
        Philbin 2015 (1503.03832): semi-hard.

    >>> embeddings, labels = torch.randn(64, 32, requires_grad=True), torch.arange(64) // 4
    >>> triplet_loss(embeddings, labels, mining="hard", margin=0.3, distance="cosine").backward()
    """
    return mined(embeddings, labels, mining, margin, distance).loss


@accepts_backend
def triplet_loss_with_stats(
    embeddings: Tensor,  # (B, D)
    labels: Tensor,  # (B,) or (B, 1)
    *,
    mining: str = "all",
    margin: float | str = 5.0,
    distance: str | DistanceFn = "euclidean",
    backend: str | None = None,
) -> tuple[Tensor, TripletStats]:
    """As `triplet_loss`, with the statistics of the same pass beside the loss; they cost no further GEMM."""
    found = mined(embeddings, labels, mining, margin, distance)
    return found.loss, statistics(found.active, found.hardest_positive, found.hardest_negative, labels, mining)


def statistics(
    active: Tensor,
    hardest_positive: Tensor,  # (B,)
    hardest_negative: Tensor,  # (B,)
    labels: Tensor,  # (B,) or (B, 1)
    mining: str,
) -> TripletStats:
    """Counts, and means over the anchors that have a positive, or a negative."""
    size, count = labels.numel(), Classes.from_labels(labels.reshape(-1)).count
    terms = {"all": (count - 1) * (size - count), "hard": torch.ones_like(count), "semi_hard": count - 1}[mining].sum()
    exists = torch.stack([count > 1, count < size])
    hardest = torch.stack([hardest_positive, hardest_negative])
    means = torch.where(exists, hardest, 0.0).sum(dim=1) / exists.sum(dim=1)
    return TripletStats(active, (active / terms).float(), *means.float().unbind())


def mined(embeddings: Tensor, labels: Tensor, mining: str, margin: float | str, distance: str | DistanceFn) -> Mined:
    """The loss, and what its statistics are made of, for callers that will ask for those later or never."""
    if mining not in MINING:
        raise InputError(f"mining must be one of {list(MINING)}, got {mining!r}.")
    soft = isinstance(margin, str)
    margin = _check_margin(margin)
    known = recognise_distance(distance)
    _check_embeddings(embeddings)
    labels = check_labels(labels, embeddings, "embeddings", "class", _NO_CLASS)
    embeddings = dense(embeddings)
    chosen = _backend(embeddings, mining, known)
    if not isinstance(known, str):
        return definition(_distances(known, embeddings), labels, mining, margin, soft)
    if chosen == "reference" or embeddings.numel() == 0:  # without numbers there are no blocks
        return materialised_loss(embeddings, labels, mining, margin, soft, known)
    return block_loss(embeddings, labels, mining, margin, soft, known, chosen)


def recognise_distance(distance: str | DistanceFn) -> str | DistanceFn:
    """The name of a distance that has a block algorithm, or the callable itself when it has none.

    Raises:
        InputError: for a name that is none of `DISTANCES`, or an object that is neither a name nor callable.
    """
    if isinstance(distance, str) and distance in DISTANCES:
        return distance
    if not callable(distance):
        raise InputError(f"distance must be one of {list(DISTANCES)} or a callable, got {distance!r}.")
    function, settings = distance, {}
    if isinstance(distance, functools.partial) and not distance.args:
        function, settings = distance.func, distance.keywords
    package = (getattr(function, "__module__", None) or "").partition(".")[0]
    owner, _, name = getattr(function, "__qualname__", "").rpartition(".")
    if package not in _STOCK_PACKAGES or owner != _STOCK_CLASS or name not in _STOCK_FUNCTIONS:
        return distance
    if settings and (name != "euclidean_distance" or set(settings) != {"squared"}):
        return distance
    return "squared_euclidean" if settings.get("squared") else _STOCK_FUNCTIONS[name]


# a compiler cannot follow what is asked of a function here. This is all that torch.compiler.assume_constant_result
# does, but that would import the compiler with the losses
recognise_distance._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_margin(margin: float | str) -> float:
    """The margin as a number: zero for a soft one."""
    if isinstance(margin, str):
        if margin != "soft":
            raise InputError(f"margin must be a number or 'soft', got {margin!r}.")
        return 0.0
    return finite_number(margin, "margin must be a finite number or 'soft'")


def _check_embeddings(embeddings: Any) -> None:
    check_rows("embeddings", embeddings)
    if len(embeddings) == 0:
        raise ShapeError("There are no embeddings: a triplet loss needs a batch of at least one row.")


def _distances(distance: DistanceFn, embeddings: Tensor) -> Tensor:  # (B, B)
    distances = distance(embeddings)
    size = len(embeddings)
    if not isinstance(distances, Tensor) or distances.shape != (size, size):
        shape = tuple(distances.shape) if isinstance(distances, Tensor) else type(distances).__name__
        raise ShapeError(f"The distance must return a ({size}, {size}) matrix for {size} embeddings, got {shape}.")
    return up(distances)


def _backend(embeddings: Tensor, mining: str, distance: str | DistanceFn) -> str:
    obstacles = {}
    if not isinstance(distance, str):
        reason = f"the distance {distance!r} is none of {list(DISTANCES)} nor a stock function for them"
        obstacles = dict.fromkeys(("tiled", "triton"), reason)
    if mining == "all" and torch.compiler.is_compiling():
        return choose(embeddings, None, obstacles).backend  # materialised triplets have no shape known ahead
    return choose(embeddings, _WORK[mining] * len(embeddings) ** 2, obstacles).backend
