"""The in-batch softmax loss as its definition reads: every block of similarities a matrix, gradients by autograd.

For query i with positive document i, the row of i holds its similarities to all documents (query_to_doc), to the other
queries (query_to_query), of its positive to all queries (doc_to_query) and to all documents of other queries
(doc_to_doc). The loss is the mean over i of log-sum-exp(row i) minus the positive's logit. Everything that the other
backends compute is measured against this file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tileloss.guide import Guide, thresholds
from tileloss.similarity import SIMILARITIES, torch_cosine, up
from tileloss.spec import ContrastiveSpec

NEG_INF = float("-inf")


class Seen(NamedTuple):
    """What a loss saw on its way, detached, and what its statistics are made of: a small batch feels their making."""

    similarities: Tensor  # (R, M)
    target: Tensor  # (R,): where the positives are
    ruled_out: Tensor | None  # (R, M)

    def statistics(self) -> Tensor:  # (3,)
        """Share of queries whose positive beats every negative, mean positive and mean hardest-negative similarity."""
        similarities, target, ruled_out = self
        positive = similarities.gather(1, target[:, None])[:, 0]
        if len(positive) == 0:
            return similarities.new_full((3,), float("nan"), dtype=torch.float32)
        negatives = similarities.clone() if ruled_out is None else similarities.masked_fill(ruled_out, NEG_INF)
        hardest = negatives.scatter_(1, target[:, None], NEG_INF).amax(dim=1)
        return torch.stack([positive > hardest, positive, hardest]).mean(dim=1).float()


def contrastive_loss(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (M, D): row i < B is the positive of query i
    scale: float | Tensor,
    spec: ContrastiveSpec,
    doc_ids: Tensor | None = None,  # (M,): documents of equal id are not negatives of each other's queries
    mask: Tensor | None = None,  # (B, M): true where document j is no negative of query i
    guide: Guide | None = None,
    rows: slice | None = None,
) -> tuple[Tensor, Seen]:
    """The loss (0-dim), and what its statistics are made of.

    With `rows`, those of some queries, whose candidates are still the texts of all; only with a guide are queries
    compared with those of `rows` alone.

    Differentiable any number of times. Time O(B M D) per direction; memory several (B, M) matrices per direction.
    """
    measure = SIMILARITIES[spec.similarity] if isinstance(spec.similarity, str) else spec.similarity

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        return up(measure(a, b))  # the four known ones do so themselves, a caller's own may not

    size = len(queries)
    positives = docs if len(docs) == size else docs[:size]
    own_queries, own_positives = taken(queries, rows), taken(positives, rows)
    target = taken(torch.arange(size, device=queries.device), rows)
    raw = similarity(own_queries, docs)
    guided = guided_out(guide, size, rows) if guide is not None else None
    if guided is not None:
        guided["query_to_doc"] = guided["query_to_doc"].scatter(1, target[:, None], False)
    masked = excluded(size, len(docs), doc_ids, mask, queries.device)
    logits = raw * scale
    blocks = {"query_to_doc": logits + hardness(raw, size, spec, rows) if spec.weighs_hardness else logits}
    if "query_to_query" in spec.directions and guided is not None:
        blocks["query_to_query"] = similarity(own_queries, own_queries) * scale
    elif "query_to_query" in spec.directions:
        own = torch.eye(size, dtype=torch.bool, device=queries.device)
        own = own if doc_ids is None else own | same_id(doc_ids[:size], doc_ids[:size])
        blocks["query_to_query"] = (similarity(own_queries, queries) * scale).masked_fill(taken(own, rows), NEG_INF)
    if "doc_to_query" in spec.directions:
        all_rows = rows is None and len(docs) == size
        blocks["doc_to_query"] = logits.T if all_rows else similarity(queries, own_positives).T * scale
    if "doc_to_doc" in spec.directions and guided is not None:
        blocks["doc_to_doc"] = similarity(own_positives, positives) * scale
    elif "doc_to_doc" in spec.directions:
        own = own_docs(size, len(docs), queries.device)
        own = own if doc_ids is None else own | same_id(doc_ids[:size], doc_ids)
        blocks["doc_to_doc"] = (similarity(docs, own_positives).T * scale).masked_fill(taken(own, rows), NEG_INF)
    if masked is not None:
        blocks["query_to_doc"] = blocks["query_to_doc"].masked_fill(taken(masked, rows), NEG_INF)
        if "doc_to_query" in blocks:
            blocks["doc_to_query"] = blocks["doc_to_query"].masked_fill(taken(masked[:, :size].T, rows), NEG_INF)
    if guided is not None:
        blocks = {direction: block.masked_fill(guided[direction], NEG_INF) for direction, block in blocks.items()}

    # in every softmax the positive of row i stands in column i, for query_to_doc comes first and doc_to_query alone
    softmaxes = list(blocks.values())
    if spec.partition == "joint" and len(softmaxes) > 1:
        softmaxes = [torch.cat(softmaxes, dim=1)]
    losses = [F.cross_entropy(softmax, target) for softmax in softmaxes]
    loss = losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2  # two directions at the most hold positives
    ruled_out = guided["query_to_doc"] if guided is not None else None if masked is None else taken(masked, rows)
    return loss, Seen(raw.detach(), target, ruled_out)


def taken(x: Tensor, rows: slice | None) -> Tensor:
    """The rows of `x`, or all."""
    return x if rows is None else x[rows]


def guided_out(guide: Guide, size: int, rows: slice | None) -> dict[str, Tensor]:
    """By direction the pairs of `rows` with candidates whose guide similarity exceeds the threshold of their row."""
    queries, docs = taken(guide.queries.detach(), rows), guide.docs.detach()
    to_docs = torch_cosine(queries, docs)
    threshold = thresholds(taken(to_docs[:, :size].T, rows).diagonal(), guide.margin, guide.strategy)[:, None]
    return {
        "query_to_doc": to_docs > threshold,
        "query_to_query": torch_cosine(queries, queries) > threshold,
        "doc_to_doc": torch_cosine(taken(docs[:size], rows), docs[:size]) > threshold,
    }


def same_id(row_ids: Tensor, doc_ids: Tensor) -> Tensor:
    """(B, M) boolean: whether row and document carry the same id."""
    return row_ids[:, None] == doc_ids[None, :]


def own_docs(size: int, docs: int, device: torch.device) -> Tensor:
    """(B, M) boolean: whether document j belongs to query i, which is so in every full column of B documents."""
    column = torch.arange(docs, device=device)
    column = torch.where(column < docs // max(size, 1) * size, column % max(size, 1), -1)
    return column[None, :] == torch.arange(size, device=device)[:, None]


def excluded(size: int, docs: int, doc_ids: Tensor | None, mask: Tensor | None, device: torch.device) -> Tensor | None:
    """(B, M) boolean: query-document pairs that are no negatives; a query's own positive is never among them."""
    if doc_ids is None and mask is None:
        return None
    out = torch.zeros(size, docs, dtype=torch.bool, device=device)
    if doc_ids is not None:
        out |= same_id(doc_ids[:size], doc_ids) & ~own_docs(size, docs, device)
    if mask is not None:
        out |= mask
    return out.diagonal_scatter(torch.zeros(size, dtype=torch.bool, device=device))


def hardness(
    similarities: Tensor,  # (R, M), of `rows` of the B queries
    size: int,
    spec: ContrastiveSpec,
    rows: slice | None,
) -> Tensor:  # (R, M)
    """The penalty on the chosen negatives: strength times their similarity, which carries no gradient and no scale."""
    docs = similarities.shape[1]
    own = taken(own_docs(size, docs, similarities.device), rows)
    in_first_column = torch.arange(docs, device=similarities.device) < size
    chosen = {
        "in_batch_negatives": ~own,
        "hard_negatives": own & ~in_first_column,
        "all_negatives": ~(own & in_first_column),
    }[str(spec.hardness)]
    # not times zero, which of an infinite distance would make nan
    return (spec.hardness_strength * similarities.detach()).masked_fill(~chosen, 0.0)
