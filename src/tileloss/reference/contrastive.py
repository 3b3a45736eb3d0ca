"""The in-batch softmax loss as its definition reads: every block of similarities a matrix, gradients by autograd.

For query i with positive document i, the row of i holds its similarities to all documents (query_to_doc), to the other
queries (query_to_query), of its positive to all queries (doc_to_query) and to all documents of other queries
(doc_to_doc). The loss is the mean over i of log-sum-exp(row i) minus the positive's logit. Everything that the other
backends compute is measured against this file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tileloss.guide import Guide, thresholds
from tileloss.similarity import SIMILARITIES, torch_cosine, up
from tileloss.spec import ContrastiveSpec

NEG_INF = float("-inf")


def contrastive_loss(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (M, D): row i < B is the positive of query i
    scale: float | Tensor,
    spec: ContrastiveSpec,
    doc_ids: Tensor | None = None,  # (M,): documents of equal id are not negatives of each other's queries
    mask: Tensor | None = None,  # (B, M): true where document j is no negative of query i
    guide: Guide | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss (0-dim) and its detached statistics (3,): accuracy, positive and hardest-negative similarity, as means.

    Differentiable any number of times. Time O(B M D) per direction; memory several (B, M) matrices per direction.
    """
    measure = SIMILARITIES[spec.similarity] if isinstance(spec.similarity, str) else spec.similarity

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        return up(measure(a, b))  # the four known ones do so themselves, a caller's own may not

    size, positives = len(queries), docs[: len(queries)]
    raw = similarity(queries, docs)
    guided = guided_out(guide, size) if guide is not None else None
    if guided is not None:
        mask = guided["query_to_doc"]
    masked = excluded(size, len(docs), doc_ids, mask, queries.device)
    blocks = {"query_to_doc": raw * scale if not spec.weighs_hardness else raw * scale + hardness(raw, spec)}
    if "query_to_query" in spec.directions:
        own = torch.eye(size, dtype=torch.bool, device=queries.device) if guided is None else guided["query_to_query"]
        own = own if doc_ids is None else own | same_id(doc_ids[:size], doc_ids[:size])
        blocks["query_to_query"] = (similarity(queries, queries) * scale).masked_fill(own, NEG_INF)
    if "doc_to_query" in spec.directions:
        blocks["doc_to_query"] = similarity(queries, positives).T * scale
    if "doc_to_doc" in spec.directions and guided is not None:
        alike = guided["doc_to_doc"]
        blocks["doc_to_doc"] = (similarity(positives, positives) * scale).masked_fill(alike, NEG_INF)
    elif "doc_to_doc" in spec.directions:
        own = own_docs(size, len(docs), queries.device)
        own = own if doc_ids is None else own | same_id(doc_ids[:size], doc_ids)
        blocks["doc_to_doc"] = (similarity(docs, positives).T * scale).masked_fill(own, NEG_INF)
    if masked is not None:
        blocks["query_to_doc"] = blocks["query_to_doc"].masked_fill(masked, NEG_INF)
        if "doc_to_query" in blocks:
            blocks["doc_to_query"] = blocks["doc_to_query"].masked_fill(masked[:, :size].T, NEG_INF)

    # in every softmax the positive of row i stands in column i, for query_to_doc comes first and doc_to_query alone
    rows = list(blocks.values())
    if spec.partition == "joint" and len(rows) > 1:
        rows = [torch.cat(rows, dim=1)]
    target = torch.arange(size, device=queries.device)
    losses = [F.cross_entropy(row, target) for row in rows]
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
    return loss, statistics(raw.detach(), masked)


def guided_out(guide: Guide, size: int) -> dict[str, Tensor]:
    """By direction the pairs (B, M) or (B, B) whose guide similarity exceeds the threshold of their row."""
    queries, docs = guide.queries.detach(), guide.docs.detach()
    to_docs = torch_cosine(queries, docs)
    threshold = thresholds(to_docs[:, :size].diagonal(), guide.margin, guide.strategy)[:, None]
    return {
        "query_to_doc": to_docs > threshold,
        "query_to_query": torch_cosine(queries, queries) > threshold,
        "doc_to_doc": torch_cosine(docs[:size], docs[:size]) > threshold,
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
    similarities: Tensor,  # (B, M)
    spec: ContrastiveSpec,
) -> Tensor:  # (B, M)
    """The penalty on the chosen negatives: strength times their similarity, which carries no gradient and no scale."""
    size, docs = similarities.shape
    own = own_docs(size, docs, similarities.device)
    in_first_column = torch.arange(docs, device=similarities.device) < size
    chosen = {
        "in_batch_negatives": ~own,
        "hard_negatives": own & ~in_first_column,
        "all_negatives": ~(own & in_first_column),
    }[str(spec.hardness)]
    return spec.hardness_strength * similarities.detach() * chosen


def statistics(
    similarities: Tensor,  # (B, M), detached
    masked: Tensor | None,  # (B, M)
) -> Tensor:  # (3,)
    """Share of queries whose positive beats every negative, mean positive and mean hardest-negative similarity."""
    positive = similarities.diagonal()
    if len(positive) == 0:
        return similarities.new_full((3,), float("nan"), dtype=torch.float32)
    negatives = similarities.clone() if masked is None else similarities.masked_fill(masked, NEG_INF)
    hardest = negatives.fill_diagonal_(NEG_INF).amax(dim=1)
    return torch.stack([positive > hardest, positive, hardest]).mean(dim=1).float()
