"""The definition against the formula written out entry by entry in Python floats."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tileloss import reference
from tileloss.spec import DIRECTIONS, ContrastiveSpec

Vector = Sequence[float]

BLOCKS = [DIRECTIONS[:1] + more for n in range(4) for more in itertools.combinations(DIRECTIONS[1:], n)]
OBJECTIVES = [(directions, "joint") for directions in BLOCKS] + [
    (("query_to_doc",), "per_direction"),
    (("query_to_doc", "doc_to_query"), "per_direction"),
]
HARDNESS = [(None, 0.0), ("in_batch_negatives", 3.0), ("hard_negatives", 3.0), ("all_negatives", 2.0)]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: Vector, b: Vector) -> float:
    return dot(a, b) / (max(math.hypot(*a), 1e-12) * max(math.hypot(*b), 1e-12))


def manhattan(a: Vector, b: Vector) -> float:
    return -math.fsum(abs(x - y) for x, y in zip(a, b, strict=True))


BY_HAND: dict[str, Callable[[Vector, Vector], float]] = {
    "cosine": cosine,
    "dot": dot,
    "euclidean": lambda a, b: -math.dist(a, b),
    "manhattan": manhattan,
}


class ByHand:
    """The loss and its statistics from one candidate at a time."""

    def __init__(self, queries: Tensor, docs: Tensor, spec: ContrastiveSpec, ids: Tensor | None, mask: Tensor | None):
        self.queries, self.docs = queries.tolist(), docs.tolist()
        self.ids = None if ids is None else ids.tolist()
        self.mask = None if mask is None else mask.tolist()
        self.spec, self.size, self.count = spec, len(queries), len(docs)
        assert isinstance(spec.similarity, str)
        self.similarity = BY_HAND[spec.similarity]

    def owns(self, query: int, doc: int) -> bool:
        return doc < self.count // self.size * self.size and doc % self.size == query

    def same(self, row: int, other: int) -> bool:
        return self.ids is not None and self.ids[row] == self.ids[other]

    def ruled_out(self, query: int, doc: int) -> bool:
        if query == doc:
            return False
        by_id = self.same(query, doc) and not self.owns(query, doc)
        return by_id or (self.mask is not None and self.mask[query][doc])

    def weight(self, query: int, doc: int) -> float:
        """What the similarity is multiplied by beside the scale."""
        own, strength = self.owns(query, doc), self.spec.hardness_strength
        chosen = {
            None: False,
            "in_batch_negatives": not own,
            "hard_negatives": own and doc >= self.size,
            "all_negatives": query != doc,
        }
        return strength if chosen[self.spec.hardness] else 0.0

    def candidates(self, i: int, direction: str, scale: float) -> list[float]:
        """The logits in row i of one direction."""
        sim, queries, docs = self.similarity, self.queries, self.docs
        if direction == "query_to_doc":
            allowed = [j for j in range(self.count) if not self.ruled_out(i, j)]
            return [sim(queries[i], docs[j]) * (scale + self.weight(i, j)) for j in allowed]
        if direction == "query_to_query":
            others = [j for j in range(self.size) if j != i and not self.same(i, j)]
            return [scale * sim(queries[i], queries[j]) for j in others]
        if direction == "doc_to_query":
            return [scale * sim(queries[j], docs[i]) for j in range(self.size) if not self.ruled_out(j, i)]
        strangers = [j for j in range(self.count) if not self.owns(i, j) and not self.same(i, j)]
        return [scale * sim(docs[j], docs[i]) for j in strangers]

    def loss(self, scale: float) -> float:
        total = 0.0
        for i in range(self.size):
            rows = [self.candidates(i, direction, scale) for direction in self.spec.directions]
            if self.spec.partition == "joint":
                rows = [list(itertools.chain(*rows))]
            normalisers = [math.log(math.fsum(math.exp(logit) for logit in row)) for row in rows]
            total += math.fsum(normalisers) / len(rows) - scale * self.similarity(self.queries[i], self.docs[i])
        return total / self.size

    def statistics(self) -> list[float]:
        first, positives, hardest = [], [], []
        for i in range(self.size):
            negatives = [j for j in range(self.count) if j != i and not self.ruled_out(i, j)]
            hardest.append(max((self.similarity(self.queries[i], self.docs[j]) for j in negatives), default=-math.inf))
            positives.append(self.similarity(self.queries[i], self.docs[i]))
            first.append(float(positives[-1] > hardest[-1]))
        return [sum(first) / self.size, sum(positives) / self.size, sum(hardest) / self.size]


def exclusions(kind: str, size: int, count: int) -> tuple[Tensor | None, Tensor | None]:
    ids = torch.arange(count) % size // 2 if kind == "ids" else None
    mask = torch.rand(size, count) < 0.3 if kind == "mask" else None
    return ids, mask


@pytest.mark.parametrize("kind", ["nothing", "ids", "mask"])
@pytest.mark.parametrize(("directions", "partition"), OBJECTIVES)
@pytest.mark.parametrize("similarity", BY_HAND)
def test_loss_and_statistics_are_the_formulas(
    similarity: str, directions: tuple[str, ...], partition: str, kind: str
) -> None:
    torch.manual_seed(0)
    for mode, strength in HARDNESS:
        for size, count in ((1, 1), (2, 4), (5, 5), (5, 15)):
            spec = ContrastiveSpec(similarity, directions, partition, mode, strength)
            queries, docs = torch.randn(size, 3).double(), torch.randn(count, 3).double()
            ids, mask = exclusions(kind, size, count)
            by_hand = ByHand(queries, docs, spec, ids, mask)
            loss, seen = reference.contrastive_loss(queries, docs, 2.5, spec, ids, mask)
            assert loss.item() == pytest.approx(by_hand.loss(2.5), rel=1e-12, abs=1e-13), (mode, size, count)
            assert seen.statistics().tolist() == pytest.approx(by_hand.statistics(), rel=1e-6), (mode, size, count)


def test_docs_that_fill_no_column_are_strangers_to_every_query() -> None:
    torch.manual_seed(0)
    queries, docs = torch.randn(3, 4).double(), torch.randn(8, 4).double()
    ids = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])  # the last two share an id with queries 0 and 1 and belong to neither
    spec = ContrastiveSpec("cosine", ("query_to_doc", "doc_to_query"))
    loss, _ = reference.contrastive_loss(queries, docs, 5.0, spec, ids, None)
    assert loss.item() == pytest.approx(ByHand(queries, docs, spec, ids, None).loss(5.0), rel=1e-12)


def test_one_pair_in_both_directions_counts_its_positive_twice() -> None:
    query, doc = torch.randn(1, 4), torch.randn(1, 4)
    both = ContrastiveSpec(directions=("query_to_doc", "doc_to_query"))
    assert reference.contrastive_loss(query, doc, 20.0, both)[0].item() == pytest.approx(math.log(2))
    assert reference.contrastive_loss(query, doc, 20.0, ContrastiveSpec())[0].item() == 0.0


def test_empty_batch_is_nan() -> None:
    loss, seen = reference.contrastive_loss(torch.randn(0, 4), torch.randn(0, 4), 20.0, ContrastiveSpec())
    assert loss.isnan()
    assert seen.statistics().isnan().all()


def test_penalty_carries_no_gradient() -> None:
    """The gradient with hardness is that of the same logits with the penalty held as a constant."""
    torch.manual_seed(0)
    queries, docs = torch.randn(4, 3).double().requires_grad_(), torch.randn(8, 3).double()
    spec = ContrastiveSpec("dot", hardness="all_negatives", hardness_strength=2.0)
    reference.contrastive_loss(queries, docs, 3.0, spec)[0].backward()

    again = queries.detach().clone().requires_grad_()
    constant = 2.0 * (queries.detach() @ docs.T)
    constant.fill_diagonal_(0.0)
    torch.nn.functional.cross_entropy(3.0 * again @ docs.T + constant, torch.arange(4)).backward()
    torch.testing.assert_close(queries.grad, again.grad, rtol=1e-12, atol=1e-14)
