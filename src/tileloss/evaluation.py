"""Quality on held-out texts: how well a model searches, and how well it brings texts of one label together.

Retrieval asks how often an anchor's own positive is among the nearest documents of the whole held-out pool. Problem:
the in-batch loss does not say how well a model searches. Method: every distinct text of the positive and negative
columns is a candidate once, every distinct anchor a query once, and the rank of a query is that of its best positive
among all candidates that are not its positives. Candidates that tie with the positive count half, so that a model that
maps everything to one vector is ranked in the middle, not first; a value that is not a number ranks last.

Labels ask whether the nearest other text has the same label. Problem: texts of one source are near to each other
before anything is learned. Method: a text's own group, where groups are known, is no candidate for it.

Trade-off of both: exact search, O(queries * candidates * dimension) time, in row blocks of bounded memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tileloss.errors import InputError, ShapeError
from tileloss.similarity import cos_sim

if TYPE_CHECKING:
    from datasets import Dataset

# similarities held at once: 64 MiB in float32
BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True)
class RetrievalTask:
    """Queries, candidates and which belong together.

    Attributes:
        queries: distinct texts.
        documents: distinct texts.
        relevant: (R, 2) int64 pairs of (query, document) positions, in the order of the queries.
    """

    queries: list[str]
    documents: list[str]
    relevant: Tensor

    @classmethod
    def from_dataset(cls, dataset: Dataset, text_columns: Sequence[str]) -> RetrievalTask:
        """The task that a dataset with the columns anchor, positive and any negatives poses."""
        anchor, positive, *negatives = text_columns
        queries = {text: row for row, text in enumerate(dict.fromkeys(dataset[anchor]))}
        texts = [text for column in (positive, *negatives) for text in dataset[column]]
        documents = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        pairs = {(queries[a], documents[p]) for a, p in zip(dataset[anchor], dataset[positive], strict=True)}
        return cls(list(queries), list(documents), torch.tensor(sorted(pairs), dtype=torch.int64))


@torch.no_grad()
def retrieval_ranks(
    queries: Tensor,  # (Q, D)
    documents: Tensor,  # (N, D)
    relevant: Tensor,  # (R, 2) int64, at least one row for every query
    similarity: Callable[[Tensor, Tensor], Tensor] = cos_sim,
) -> Tensor:  # (Q,) float32, from 1
    """The rank of each query's best relevant document among the documents that are not relevant to it.

    Rank 1 + (documents more similar) + (documents exactly as similar) / 2; NaN similarities rank last. Time O(Q N D),
    memory 64 MiB of similarities at a time, or one row of them where N is larger than that.

    Raises:
        ShapeError: when the shapes are not these, or a query has no relevant document.
    """
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ShapeError(f"Expected (Q, D) queries and (N, D) documents, got {queries.shape} and {documents.shape}.")
    relevant = relevant.to(queries.device)
    counts = torch.bincount(relevant[:, 0], minlength=len(queries))
    if len(counts) > len(queries) or not bool((counts > 0).all()):
        raise ShapeError(
            f"Every one of {len(queries)} queries needs a relevant document, and no other query may have."
        )
    rows, columns = relevant[relevant[:, 0].argsort(stable=True)].T
    ends = counts.cumsum(0).tolist()
    block = max(1, BLOCK_ELEMENTS // len(documents))
    ranks = []
    for start in range(0, len(queries), block):
        scores = similarity(queries[start : start + block], documents).clone()
        own = slice(ends[start - 1] if start else 0, ends[min(start + block, len(queries)) - 1])
        row, column = rows[own] - start, columns[own]
        best = scores.new_full((len(scores),), -torch.inf).scatter_reduce(0, row, scores[row, column], "amax")
        scores[row, column] = -torch.inf
        # "not at most" instead of "above", so that a NaN on either side counts against the query
        above = (~(scores <= best[:, None])).sum(1)
        ties = ((scores == best[:, None]) & (scores > -torch.inf)).sum(1)
        ranks.append(1 + above + ties / 2)
    return torch.cat(ranks).float()


def retrieval_metrics(ranks: Tensor, cutoffs: Sequence[int] = (1, 10)) -> dict[str, float]:
    """recall@k for each cutoff, the share of queries ranked k or better, and MRR@k for the last cutoff.

    MRR@k is the mean of 1/rank, counting 0 beyond rank k.

    Raises:
        InputError: for no ranks at all.

    >>> retrieval_metrics(torch.tensor([1.0, 2.0, 20.0, 1.0]))
    {'recall@1': 0.5, 'recall@10': 0.75, 'mrr@10': 0.625}
    """
    if ranks.numel() == 0:
        raise InputError("There is no query to evaluate.")
    metrics = {f"recall@{k}": (ranks <= k).double().mean().item() for k in cutoffs}
    last = cutoffs[-1]
    metrics[f"mrr@{last}"] = torch.where(ranks <= last, 1 / ranks.double(), 0.0).mean().item()
    return metrics


@dataclass(frozen=True)
class LabelTask:
    """Texts, what each is, and which are near to each other for another reason.

    Attributes:
        texts: distinct texts.
        labels: (N,) int64, the class of each.
        groups: (N,) int64; texts of one group are no candidates for each other. Distinct where no groups are known.
    """

    texts: list[str]
    labels: Tensor
    groups: Tensor

    @classmethod
    def from_dataset(cls, dataset: Dataset, text: str, label: str, group: str | None = None) -> LabelTask:
        """The task that a dataset with a text and a label column poses; of a repeated text the first row counts.

        Raises:
            InputError: when there is no such group column.
        """
        if group is not None and group not in dataset.column_names:
            raise InputError(f"There is no column {group!r} of groups, only {', '.join(dataset.column_names)}.")
        rows: dict[str, int] = {}
        for row, value in enumerate(dataset[text]):
            rows.setdefault(value, row)
        kept = list(rows.values())
        labels, known = dataset[label], dataset[group] if group else range(len(dataset))
        numbers = {value: number for number, value in enumerate(dict.fromkeys(known))}
        groups = torch.tensor([numbers[known[row]] for row in kept])
        return cls(list(rows), torch.tensor([int(labels[row]) for row in kept]), groups)


@torch.no_grad()
def label_metrics(
    embeddings: Tensor,  # (N, D)
    labels: Tensor,  # (N,) whole numbers
    groups: Tensor | None = None,  # (N,) whole numbers
    similarity: Callable[[Tensor, Tensor], Tensor] = cos_sim,
) -> dict[str, float]:
    """How well nearness tells labels: accuracy@1 of the nearest other text, MAP@R, and how many texts were asked for.

    Candidates for a text are all texts outside its group (all others, without groups). A text is asked for when one of
    its candidates has its label; let R be their number. accuracy@1 is the share of texts whose most similar candidate
    has their label, where several tie: the share among those. MAP@R is the mean over texts of 1/R times the sum, over
    the ranks i from 1 to R at which a candidate of the same label stands, of the precision among the first i
    (Musgrave, Belongie and Lim, "A Metric Learning Reality Check", 2020). NaN similarities rank last. Time O(N^2 D),
    memory a few blocks of 64 MiB.

    Returns:
        {"accuracy@1": ..., "map@r": ..., "queries": ...}

    Raises:
        ShapeError: when the shapes are not these.
        InputError: when no text has a candidate of its label.

    >>> label_metrics(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.1, 0.9]]), torch.tensor([4, 4, 7]))
    {'accuracy@1': 1.0, 'map@r': 1.0, 'queries': 2}
    """
    size = len(embeddings)
    groups = torch.arange(size) if groups is None else groups
    if embeddings.ndim != 2 or labels.shape != (size,) or groups.shape != (size,):
        raise ShapeError(
            f"Expected (N, D) embeddings with (N,) labels and groups, got {tuple(embeddings.shape)}, "
            f"{tuple(labels.shape)} and {tuple(groups.shape)}."
        )
    labels, groups = labels.to(embeddings.device), groups.to(embeddings.device)
    relevant = _class_sizes(labels) - _class_sizes(torch.stack([labels, groups], dim=1))
    asked = relevant > 0
    if not bool(asked.any()):
        raise InputError("No text has another of its label, outside its own group, to be found.")
    deepest = int(relevant.max())
    ranks = torch.arange(1, deepest + 1, device=embeddings.device)
    block = max(1, BLOCK_ELEMENTS // size)
    nearest, precision = [], []
    for rows in torch.arange(size, device=embeddings.device)[asked].split(block):
        scores = similarity(embeddings[rows], embeddings)
        scores = scores.masked_fill(scores.isnan() | (groups[rows, None] == groups), -torch.inf)
        own = relevant[rows, None]
        best, order = scores.topk(deepest)
        tied = (scores == best[:, :1]) & (scores > -torch.inf)
        same = tied & (labels[rows, None] == labels)
        nearest.append(same.sum(1) / tied.sum(1).clamp(min=1))
        hits = (labels[rows, None] == labels[order]) & (best > -torch.inf) & (ranks <= own)
        precision.append((hits * hits.cumsum(1) / ranks).double().sum(1) / own[:, 0])
    return {
        "accuracy@1": torch.cat(nearest).double().mean().item(),
        "map@r": torch.cat(precision).mean().item(),
        "queries": int(asked.sum()),
    }


def _class_sizes(keys: Tensor) -> Tensor:
    """For each row of `keys`, how many rows are equal to it."""
    _, index, counts = keys.unique(dim=0, return_inverse=True, return_counts=True)
    return counts[index]
