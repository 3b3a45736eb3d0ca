"""Triplets mined from a block of distances: which count, what they add to the loss, and the slopes of their products.

A block is R rows (anchors) of the products of all rows with each other, which a pass turns into distances itself.
`Mining` is the PyTorch form of the three passes that the driver in `triplet.py` needs; `tileloss.kernels.mining` has
the same three in Triton. None makes anything of rows x positives x columns: the positives of an anchor are gathered
from its row, and then compared with the row one after the other, or, where they are many, all at once by bisection
(every triplet) or by sorting the row (semi-hard).

What is found is kept per anchor, so that a sum over all of them is one reduction in a fixed order. The passes
overwrite the block; beside it they hold parts of it of a few megabytes, which stay in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tileloss.tiled.chosen_pairs import pull_pairs
from tileloss.tiled.distance import BLOCK_DISTANCES, SquaredEuclideanDistance
from tileloss.tiled.rows import Rows

INF = float("inf")
# a hinge counts as active above this, as sentence-transformers has it
ACTIVE = 1e-16
# entries of a block that are passed over at a time, measured: a few such parts fit the third-level cache
_PART = 1 << 20
# positives of an anchor from which it pays to bisect, or to sort, instead of looping over them: measured
_BISECT_FROM = 24
_SORT_FROM = 96
# rows of a batch, for each pair of an anchor, from which it pays to carry pairs back one by one: measured
_FEW = 8
_WITHOUT_FLOAT64 = ("mps",)  # devices on which sums of hinges have to do with the distances' dtype


class Classes(NamedTuple):
    """The rows of a batch by label. Rows of one class are neighbours in `order`, ascending.

    Attributes:
        of: (B,) int32, the number of each row's class, in the order of the labels.
        order: (B,) int64, the rows sorted by class, and within a class in the order of the batch.
        first: (B,) int64, where in `order` the class of row i begins.
        count: (B,) int64, how many rows the class of row i has, itself included.
    """

    of: Tensor
    order: Tensor
    first: Tensor
    count: Tensor  # type: ignore[assignment]  # hides a method of tuples that nobody calls

    @classmethod
    def from_labels(
        cls,
        labels: Tensor,  # (B,), B > 0
    ) -> Classes:
        """Sort labels of any number type into classes, without waiting for the device. Time O(B log B)."""
        labels = labels.to(torch.uint8) if labels.dtype == torch.bool else labels
        sorted_labels, order = torch.sort(labels, stable=True)
        begins = torch.zeros_like(order, dtype=torch.int32)
        begins[1:] = sorted_labels[1:] != sorted_labels[:-1]
        number = begins.cumsum(0, dtype=torch.int32)
        first = torch.searchsorted(number, number)
        count = torch.searchsorted(number, number, right=True) - first
        by_row = [torch.empty_like(x).scatter_(0, order, x) for x in (number, first, count)]
        return cls(by_row[0], order, *by_row[1:])


@dataclass(frozen=True)
class MiningProblem:
    """What every pass must know of the call beside the block.

    Attributes:
        size: B, the number of rows.
        classes: of the rows.
        distance: a name of `tileloss.tiled.distance.BLOCK_DISTANCES`.
        margin: what a negative should be farther away than a positive, at least; 0 with `soft`.
        soft: softplus(difference) in the place of max(difference + margin, 0).
    """

    size: int
    classes: Classes
    distance: str
    margin: float
    soft: bool


class Mining(Rows):
    """The passes in PyTorch, in place; distances and sums in float32, or float64 for float64 inputs.

    Every pass takes a block (R, B) of products of the rows from `start` with all rows, their squared norms (R,) and
    those of all rows (B,), both None for "cosine". It fills in what it finds for these rows, and returns the slopes
    (R, B), the gradients of the products times `gradient_unit`, or None where no gradients are wanted. The distance of
    a row to itself is exactly zero.

    Attributes:
        pairs: where the pairs that `semi_hard` finds are few, their slopes (B, 2 P), some of them zero, and the rows
            (B, 2 P) int64 that the anchors meet in them; it then returns no slopes. Else None.
        total: (B,) sum over an anchor's terms of hinge or softplus. Filled by `all_triplets` and `semi_hard`.
        active: (B,) int64, the terms that count. Triplets for `all_triplets`, pairs of anchor and positive for
            `semi_hard`: those with a hinge above zero (`ACTIVE` for triplets); with `soft` all there are.
        hardest_positive: (B,) distance of an anchor's farthest positive, minus infinity where it has none.
        hardest_negative: (B,) distance of its nearest negative, infinity where it has none.
        positive_index: (B,) int64, filled by `hard`: the first positive at that distance; the anchor itself where
            there is none, or none farther than zero.
        negative, negative_index: (B,), (B,) int64, filled by `hard`: the distance that is subtracted and the row at
            which it is measured. Both are found as the first smallest entry of an anchor's row after its largest
            distance was added to every entry that is no negative's (its own too). Where that entry is a negative, it
            is the nearest one; else, for want of negatives, or where all are as far away as anything in the row, it
            is the first row at the largest distance.
    """

    gradient_unit = 1.0  # the passes return the gradients of the products times this
    blocks_held = 1  # at once, of the memory of a block

    def __init__(
        self,
        problem: MiningProblem,
        embeddings: Tensor,  # (B, D)
    ) -> None:
        super().__init__(embeddings)
        self.problem = problem
        self.total = torch.zeros(problem.size, dtype=self.dtype, device=embeddings.device)
        self.active = torch.zeros_like(self.total, dtype=torch.int64)
        self.hardest_positive, self.hardest_negative, self.negative = (torch.empty_like(self.total) for _ in range(3))
        self.positive_index, self.negative_index = (torch.empty_like(self.active) for _ in range(2))
        self.hardest_positive.fill_(-INF)
        self.pairs: tuple[Tensor, Tensor] | None = None

    @property
    def distance(self) -> SquaredEuclideanDistance:
        """Of the problem, over rows as they are read here.

        Made at every look: one that was kept would close a circle with this object, which then held its memory until
        the garbage collector came by.
        """
        return BLOCK_DISTANCES[self.problem.distance](self)

    def all_triplets(
        self,
        start: int,
        block: Tensor,  # (R, B): products; is overwritten
        left_squares: Tensor | None,  # (R,)
        right_squares: Tensor | None,  # (B,)
        gradients: bool,
    ) -> Tensor | None:  # (R, B)
        """Every triplet of an anchor, a positive p and a negative n, by t = d(p) - d(n) + margin.

        A hinge max(t, 0) has slope one at t = 0.
        """
        for part in self._parts(start, block, left_squares, right_squares):
            self._mask(part, INF)
            self.hardest_negative[part.rows] = part.block.amin(dim=1)
            bisects = part.columns.shape[1] >= _BISECT_FROM and not self.problem.soft
            violations = self._bisect(part) if bisects else self._loop(part)
            if gradients:
                grad, pulls = violations
                grad.neg_().scatter_(1, part.columns, pulls)
                self._restore(part)
                part.block.copy_(self.distance.slopes_(grad, part.block))
        return block if gradients else None

    def semi_hard(
        self,
        start: int,
        block: Tensor,  # (R, B): products; is overwritten
        left_squares: Tensor | None,  # (R,)
        right_squares: Tensor | None,  # (B,)
        gradients: bool,
    ) -> Tensor | None:  # (R, B)
        """Every pair of an anchor and a positive p, with one negative n by t = d(p) - d(n) + margin.

        n is the first of the nearest negatives that are farther away than p; failing that, of the farthest negatives.
        In a batch without negatives d(n) is zero and has no slope. A hinge max(t, 0) has slope one half at t = 0.
        """
        margin, soft = self.problem.margin, self.problem.soft
        for part in self._parts(start, block, left_squares, right_squares):
            negative, index = self._semi_hard_negatives(part)
            exists = negative > -INF
            negative = torch.where(exists, negative, 0.0)
            t = torch.where(part.valid, part.positives - negative + margin, -INF)
            terms = F.softplus(t) if soft else t.clamp_min(0.0)
            self.total[part.rows] = terms.sum(dim=1)
            self.active[part.rows] = (part.valid if soft else terms).count_nonzero(dim=1)
            if gradients:
                weight = t.sigmoid() if soft else (t > 0.0).to(t.dtype).add_(t >= 0.0).mul_(0.5)
                weights = torch.cat([weight, -weight * exists], dim=1)
                slopes = self.distance.slopes_(weights, torch.cat([part.positives, negative], dim=1))
                self._keep(part, slopes, torch.cat([part.columns, index], dim=1))
        return block if gradients and self.pairs is None else None

    def _keep(
        self,
        part: _Part,
        slopes: Tensor,  # (R, 2 P)
        partners: Tensor,  # (R, 2 P) int64
    ) -> None:
        """The slopes of an anchor's pairs as pairs, or as a part of the block, whichever is carried back faster."""
        size, per_row = self.problem.size, partners.shape[1]
        if not 0 < per_row * _FEW <= size:
            part.block.zero_().scatter_add_(1, partners, slopes)
            return
        if self.pairs is None:
            self.pairs = slopes.new_empty(size, per_row), partners.new_empty(size, per_row)
        for kept, found in zip(self.pairs, (slopes, partners), strict=True):
            kept[part.rows] = found

    def hard(
        self,
        start: int,
        block: Tensor,  # (R, B): products; is overwritten
        left_squares: Tensor | None,  # (R,)
        right_squares: Tensor | None,  # (B,)
    ) -> None:
        """Fill in each anchor's farthest positive and nearest negative; the slopes are few, and left to the driver."""
        of, count = self.problem.classes.of, self.problem.classes.count
        for part in self._parts(start, block, left_squares, right_squares):
            rows, distances = part.rows, part.block
            farthest, farthest_index = distances.max(dim=1)
            own = torch.arange(rows.start, rows.stop, device=block.device)
            self.positive_index[rows] = own
            if part.columns.shape[1]:
                slot = torch.where(part.valid, part.positives, -INF).argmax(dim=1, keepdim=True)
                chosen = part.columns.gather(1, slot)[:, 0]
                self.positive_index[rows] = torch.where(self.hardest_positive[rows] > 0, chosen, own)
            distances.scatter_(1, part.columns, part.positives + farthest[:, None])
            distances.diagonal(rows.start).copy_(farthest)
            self.negative[rows], index = distances.min(dim=1)
            is_negative = of[index] != of[rows]
            self.negative_index[rows] = torch.where(is_negative, index, farthest_index)
            self.hardest_negative[rows] = torch.where(count[rows] < self.problem.size, self.negative[rows], INF)

    def pull_pairs(
        self,
        weights: Tensor,  # (B, k)
        partners: Tensor,  # (B, k) int64
        left: Tensor,  # (B, D)
        right: Tensor,  # (B, D)
        d_left: Tensor | None,  # (B, D): is added to
        d_right: Tensor | None,  # (B, D): is added to
        *,
        norms: bool = False,
    ) -> None:
        """As `tileloss.tiled.chosen_pairs.pull_pairs`; for the slopes of the hardest triplets."""
        pull_pairs(weights, partners, left, right, d_left, d_right, norms=norms)

    def _parts(
        self,
        start: int,
        block: Tensor,  # (R, B): products; is overwritten by distances
        left_squares: Tensor | None,  # (R,)
        right_squares: Tensor | None,  # (B,)
    ) -> Iterator[_Part]:
        """Some rows of the block at a time, as distances, with the positives of each."""
        step = max(_PART // block.shape[1], 1)
        for first in range(0, len(block), step):
            distances = block[first : first + step]
            rows = slice(start + first, start + first + len(distances))
            squares = None if left_squares is None else left_squares[first : first + step]
            self.distance.distances_(distances, squares, right_squares)
            distances.diagonal(rows.start).zero_()
            columns, valid = self._positives(rows)
            positives = distances.gather(1, columns)
            if columns.shape[1]:
                self.hardest_positive[rows] = torch.where(valid, positives, -INF).amax(dim=1)
            yield _Part(rows, distances, columns, valid, positives)

    def _positives(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The columns (R, P) int64 of each anchor's positives, ascending, and which of these places (R, P) are taken.

        P is the number of positives in the largest class; a place that is not taken names the anchor itself.
        """
        _, order, first, count = self.problem.classes
        slot = torch.arange(self._most_positives, device=order.device)
        place = first[rows, None] + slot
        place += place >= self._own_place[rows, None]  # steps over the anchor itself
        valid = slot < count[rows, None] - 1
        own = torch.arange(rows.start, rows.stop, device=order.device)[:, None]
        return torch.where(valid, order[place.clamp_max_(len(order) - 1)], own), valid

    @functools.cached_property
    def _most_positives(self) -> int:
        """Of any row. The one number that these passes must wait for, where the device is not the CPU."""
        return int(self.problem.classes.count.max()) - 1

    @functools.cached_property
    def _own_place(self) -> Tensor:  # (B,) int64
        """Where in the order of the classes each row stands."""
        order = self.problem.classes.order
        return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))

    def _mask(self, part: _Part, value: float) -> None:
        """Put a value at what is no negative."""
        part.block.scatter_(1, part.columns, value)
        part.block.diagonal(part.rows.start).fill_(value)

    def _restore(self, part: _Part) -> None:
        """Undo `_mask`."""
        part.block.scatter_(1, part.columns, part.positives)
        part.block.diagonal(part.rows.start).zero_()

    def _loop(self, part: _Part) -> tuple[Tensor, Tensor]:
        """Sum and count over the triplets, one positive of every anchor at a time: P passes over the part.

        Returns the slopes of the negatives' and the positives' distances, (R, B) and (R, P), both without their sign.
        """
        distances, soft = part.block, self.problem.soft
        thresholds = torch.where(part.valid, part.positives + self.problem.margin, -INF)
        t, flags, by_negative = torch.empty_like(distances), torch.empty_like(distances), torch.zeros_like(distances)
        by_positive = torch.zeros_like(thresholds)
        for slot in range(thresholds.shape[1]):
            torch.sub(thresholds[:, slot, None], distances, out=t)
            if soft:
                self.total[part.rows] += F.softplus(t).sum(dim=1)
                weights = torch.sigmoid(t, out=flags)
            else:
                weights = torch.ge(t, 0.0, out=flags)
            by_negative += weights
            by_positive[:, slot] = weights.sum(dim=1)
            if not soft:
                self.total[part.rows] += t.clamp_min_(0.0).sum(dim=1)
                self.active[part.rows] += torch.gt(t, ACTIVE, out=flags).sum(dim=1).long()
        if soft:
            count = self.problem.classes.count[part.rows]
            self.active[part.rows] = (count - 1) * (self.problem.size - count)
        return by_negative, by_positive

    def _bisect(self, part: _Part) -> tuple[Tensor, Tensor]:
        """As `_loop` for hinges, with log P passes: each distance's place among the sorted thresholds of its row.

        The place says how many thresholds it violates, and a histogram of the places how many distances violate a
        threshold. The sum of the hinges is one of threshold times count less one of distance times count, both
        relative to the row's largest threshold, so that digits which all have in common do not cancel.
        """
        distances = part.block
        thresholds = torch.where(part.valid, part.positives + self.problem.margin, -INF)
        thresholds, ranks = thresholds.sort(dim=1)
        most = thresholds.shape[1]
        self.active[part.rows] = (most - _places(thresholds - ACTIVE, distances, right=True)).sum(dim=1)
        places = _places(thresholds, distances, right=False)
        counts = torch.zeros(len(places), most + 1, dtype=torch.int64, device=places.device)
        counts.scatter_add_(1, places, torch.ones((1, 1), dtype=torch.int64, device=places.device).expand_as(places))
        counts = counts.cumsum(dim=1)[:, :-1]  # of the distances at or below each threshold
        by_negative = (most - places).to(distances.dtype)
        by_positive = torch.empty_like(thresholds).scatter_(1, ranks, counts.to(thresholds.dtype))
        centre = torch.where(thresholds[:, -1:] > -INF, thresholds[:, -1:], 0.0)
        self._restore(part)  # zero times infinity is no number
        below = torch.where(thresholds > -INF, centre - thresholds, 0.0)
        dtype = distances.dtype if distances.device.type in _WITHOUT_FLOAT64 else torch.float64
        gained = ((centre - distances) * by_negative).sum(dim=1, dtype=dtype)
        self.total[part.rows] = gained - (below * counts).sum(dim=1, dtype=dtype)
        return by_negative, by_positive

    def _semi_hard_negatives(self, part: _Part) -> tuple[Tensor, Tensor]:
        """Distance and index (R, P) of the negative that goes with each positive; minus infinity without negatives."""
        self._mask(part, -INF)
        farthest, farthest_index = part.block.max(dim=1, keepdim=True)
        self._mask(part, INF)
        self.hardest_negative[part.rows] = part.block.amin(dim=1)
        negative, index = (self._sort if part.columns.shape[1] >= _SORT_FROM else self._next_by_loop)(part)
        found = negative < INF
        return torch.where(found, negative, farthest), torch.where(found, index, farthest_index)

    def _next_by_loop(self, part: _Part) -> tuple[Tensor, Tensor]:
        """The nearest of the negatives beyond each positive, infinity without one: a few passes for each positive."""
        distances = part.block
        beyond, flags = torch.empty_like(distances), torch.empty_like(distances)
        index = torch.empty_like(part.columns)
        negative = torch.empty_like(part.positives)
        out_of_reach = torch.finfo(distances.dtype).max / 4
        for slot in range(part.columns.shape[1]):
            torch.le(distances, part.positives[:, slot, None], out=flags)
            torch.add(distances, flags, alpha=out_of_reach, out=beyond)
            negative[:, slot], index[:, slot] = beyond.min(dim=1)
        return torch.where(negative < out_of_reach, negative, INF), index

    def _sort(self, part: _Part) -> tuple[Tensor, Tensor]:
        """As `_next_by_loop`, from the sorted row."""
        distances, columns = part.block.sort(dim=1, stable=True)
        place = torch.searchsorted(distances, part.positives, right=True).clamp_max_(self.problem.size - 1)
        return distances.gather(1, place), columns.gather(1, place)


class _Part(NamedTuple):
    """Some rows of a block."""

    rows: slice  # in the numbering of the batch
    block: Tensor  # (R, B): distances
    columns: Tensor  # (R, P) int64: of the positives
    valid: Tensor  # (R, P): whether there is such a positive
    positives: Tensor  # (R, P): their distances; zero where there is none


def _places(
    thresholds: Tensor,  # (R, P) ascending
    values: Tensor,  # (R, B)
    right: bool,
) -> Tensor:  # (R, B) int64
    """How many thresholds lie below each value of their row; with `right`, at or below it.

    What `torch.searchsorted` gives, several times as fast on a CPU, because all values take each step together.
    """
    count = thresholds.shape[1]
    padded = F.pad(thresholds, (0, (1 << count.bit_length()) - 1 - count), value=INF)
    place = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    probe, passed = torch.empty_like(values), torch.empty_like(place)
    compare = torch.le if right else torch.lt
    for bit in reversed(range(count.bit_length())):
        # the step comes first: the threshold there is the last of those that it would pass
        torch.gather(padded[:, (1 << bit) - 1 :], 1, place, out=probe)
        compare(probe, values, out=passed)
        place.add_(passed.mul_(1 << bit))
    return place.clamp_max_(count)
