"""In-batch softmax cross-entropy (InfoNCE and its relatives) without the batch-by-batch matrix.

The forward computes the loss and, when they will be wanted, the gradients of its inputs in one walk over row blocks;
the backward only scales what is there. Nothing of size B x M is held, and there is nothing to recompute. The price is
that a forward whose backward is never called has done the backward's work; under `torch.no_grad` it does none of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tileloss import reference
from tileloss.arguments import items, number
from tileloss.backend import accepts_backend, choose
from tileloss.errors import DeviceError, DtypeError, InputError, ShapeError
from tileloss.functional.checks import check_queries_and_docs
from tileloss.functional.contrastive_op import block_loss
from tileloss.guide import Guide
from tileloss.reference.contrastive import Seen
from tileloss.similarity import SimilarityFn, dense, full_precision, is_rowwise
from tileloss.spec import ContrastiveSpec


class ContrastiveStats(NamedTuple):
    """What the loss saw on its way, each a detached 0-dim float32 tensor on the embeddings' device.

    Attributes:
        accuracy: share of queries whose positive is more similar than every one of their negatives.
        positive_similarity: mean similarity of query and positive.
        hardest_negative_similarity: mean over queries of the most similar negative document; -inf without negatives.
    """

    accuracy: Tensor
    positive_similarity: Tensor
    hardest_negative_similarity: Tensor


class Call(NamedTuple):
    """A call whose arguments fit together, as the backends take it."""

    queries: Tensor  # (B, D) strided
    docs: Tensor  # (M, D) strided
    scale: float | Tensor  # a tensor: 0-dim
    spec: ContrastiveSpec
    doc_ids: Tensor | None  # (M,)
    mask: Tensor | None  # (B, M) boolean
    guide: Guide | None


@accepts_backend
def contrastive_loss(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (M, D)
    *,
    scale: float | Tensor = 20.0,
    similarity: str | SimilarityFn = "cosine",
    directions: Sequence[str] = ("query_to_doc",),
    partition: str = "joint",
    hardness: tuple[str | None, float] | None = None,
    exclude: Tensor | Guide | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean over queries of log-sum-exp(candidates) minus the positive's logit: cross-entropy with in-batch negatives.

    The row of query i holds, by direction, the scaled similarities of: query i to all documents (query_to_doc), query
    i to the other queries (query_to_query), positive i to all queries (doc_to_query), positive i to all documents of
    other queries (doc_to_doc).

    Args:
        queries: (B, D) floating point, any strides; sparse ones are made dense. The loss of an empty batch is nan.
        docs: (M, D), M >= B. Row i < B is the positive of query i. Further rows are further negatives; when M is a
            multiple of B they are columns of hard negatives, row c * B + i belonging to query i.
        scale: what similarities are multiplied by (1 / temperature); a positive number, or a 0-dim tensor, which gets
            its gradient.
        similarity: "cosine", "dot", "euclidean" or "manhattan" (negative distances), sentence-transformers' function
            of that name, or any callable (N, D), (M, D) -> (N, M). A callable runs materialised unless
            `tileloss.rowwise` declares it.
        directions: a subset of the four above, with "query_to_doc" in it.
        partition: "joint", one softmax over the whole row, or "per_direction", one over each direction, averaged.
        hardness: (mode, strength): adds strength * stop_gradient(similarity) to the query_to_doc logits of
            "in_batch_negatives", "hard_negatives" or "all_negatives".
        exclude: integer ids, (B,) or (M,): texts of rows whose ids match are no negatives of each other; or a boolean
            (B, M) mask, true where document j is no negative of query i (it acts on query_to_doc and doc_to_query).
            A query's own positive is never excluded, nor are its own hard negatives by ids. Or a `Guide`: embeddings
            by another model, whose cosine similarity rules out what it exceeds a threshold for (GISTEmbed). Its
            similarities are computed block by block too. With a guide, doc_to_doc compares positives with positives
            alone, in both it and query_to_query a text is a candidate of itself unless the guide rules it out, and
            doc_to_query is not available.
        backend: "reference", "tiled", "triton" or "auto", for this call alone; see `tileloss.backend`.

    Returns:
        A 0-dim tensor: float64 for float64 inputs, else float32. Differentiable in queries, docs and scale. A second
        derivative goes through the materialised definition: exact, in O(B M) memory.

    Raises:
        ShapeError, DtypeError, DeviceError, InputError: for inputs that do not fit, before any work.
        BackendError: for a backend that was asked for by name and cannot run.

    Cost:
        Three GEMMs of B x M x D for query_to_doc forward and backward together, four with doc_to_query. Memory beside
        inputs and gradients: a copy of the inputs, and blocks of 16 MB on a CPU and 224 MB on a GPU: one or two, with
        distances four.

    Source:
        van den Oord et al. 2018 (arXiv 1807.03748); directions: Li et al. 2023 (2308.03281); hardness: Lan et al. 2025
        (2503.04812).

    >>> queries, docs = torch.randn(64, 32, requires_grad=True), torch.randn(64, 32)
    >>> loss = contrastive_loss(queries, docs, directions=("query_to_doc", "doc_to_query"), partition="per_direction")
    >>> loss.backward()
    """
    return loss_and_seen(check_call(queries, docs, scale, similarity, directions, partition, hardness, exclude))[0]


@accepts_backend
def contrastive_loss_with_stats(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (M, D)
    *,
    scale: float | Tensor = 20.0,
    similarity: str | SimilarityFn = "cosine",
    directions: Sequence[str] = ("query_to_doc",),
    partition: str = "joint",
    hardness: tuple[str | None, float] | None = None,
    exclude: Tensor | Guide | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ContrastiveStats]:
    """As `contrastive_loss`, with the statistics of the same pass beside the loss; they cost no further GEMM."""
    call = check_call(queries, docs, scale, similarity, directions, partition, hardness, exclude)
    loss, seen = loss_and_seen(call)
    return loss, stats_of(seen)


def loss_and_seen(call: Call) -> tuple[Tensor, Tensor | Seen]:
    """The loss of a checked call, for callers that will ask `stats_of` for its statistics later or never.

    The statistics (3,) of blocks cost nothing and are there; those of a materialised batch are yet to be made.
    """
    chosen = choose_backend(call.queries, call.docs, call.spec)
    if chosen != "reference":
        return block_loss(*call, chosen)
    with full_precision(call.queries):
        return reference.contrastive_loss(*call)


def stats_of(seen: Tensor | Seen) -> ContrastiveStats:
    """The statistics, from what `loss_and_seen` gives beside the loss."""
    statistics = seen.statistics() if isinstance(seen, Seen) else seen
    return ContrastiveStats(*statistics.unbind())


def check_call(
    queries: Tensor,
    docs: Tensor,
    scale: float | Tensor = 20.0,
    similarity: str | SimilarityFn = "cosine",
    directions: Sequence[str] = ("query_to_doc",),
    partition: str = "joint",
    hardness: tuple[str | None, float] | None = None,
    exclude: Tensor | Guide | None = None,
) -> Call:
    """Refuse arguments of `contrastive_loss` that do not fit, and give the others in the backends' form."""
    if not isinstance(directions, str):
        directions = items(() if directions is None else directions, "directions must be a tuple of names")
    spec = ContrastiveSpec(similarity, directions, partition, *_mode_and_strength(hardness))
    check_scale(scale)
    scale = scale.reshape(()) if isinstance(scale, Tensor) else scale  # so that its dtype never decides the result's
    _check_embeddings(queries, docs, spec)
    queries, docs = dense(queries), dense(docs)
    if isinstance(exclude, Guide):
        _check_guide(exclude, queries, docs, spec)
        return Call(queries, docs, scale, spec, None, None, exclude)
    return Call(queries, docs, scale, spec, *_exclusions(exclude, len(queries), docs), None)


def _mode_and_strength(hardness: tuple[str | None, float] | None) -> tuple[str | None, float]:
    if hardness is None:
        return None, 0.0
    pair = items(hardness, "hardness must be a pair (mode, strength)")
    if len(pair) != 2:
        raise InputError(f"hardness must be a pair (mode, strength), got {hardness!r}.")
    return pair


def check_scale(scale: float | Tensor) -> None:
    """Refuse a scale that is no positive number; a tensor's value is not read, lest a GPU be waited for."""
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ShapeError(f"scale must be a number or a tensor with one element, got shape {tuple(scale.shape)}.")
        if not scale.is_floating_point():
            raise DtypeError(f"scale must be a floating-point tensor, got {scale.dtype}.")
        return
    if not 0 < number(scale, "Scale must be a number or a tensor") < math.inf:  # nan included
        raise InputError(f"Scale must be a positive value. Got {scale!r}; 20.0 suits cosine, 1.0 dot products.")


def _check_embeddings(queries: Tensor, docs: Tensor, spec: ContrastiveSpec) -> None:
    check_queries_and_docs(queries, docs)
    size, count = len(queries), len(docs)
    if size and count % size and ("doc_to_doc" in spec.directions or spec.weighs_hardness):
        raise ShapeError(
            f"doc_to_doc and hardness must know whose negatives the docs are: their number ({count}) must be a "
            f"multiple of the number of queries ({size})."
        )


def _exclusions(exclude: Tensor | None, size: int, docs: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Ids of all documents (M,), or a boolean mask (B, M), from what the caller gave."""
    if exclude is None:
        return None, None
    if not isinstance(exclude, Tensor):
        raise InputError(
            f"exclude must be a tensor of integer ids or booleans, or a tileloss.Guide, got {type(exclude).__name__}."
        )
    count = len(docs)
    if exclude.device != docs.device:
        raise DeviceError(f"exclude is on {exclude.device} and the embeddings on {docs.device}; move it there.")
    if exclude.dtype == torch.bool:
        if exclude.shape != (size, count):
            raise ShapeError(f"A boolean exclude must have shape ({size}, {count}), got {tuple(exclude.shape)}.")
        return None, exclude
    if exclude.is_floating_point() or exclude.is_complex():
        raise DtypeError(f"exclude must hold integer ids or booleans, got {exclude.dtype}.")
    if exclude.shape == (count,):
        return exclude, None
    if exclude.shape == (size,) and size and count % size == 0:
        return exclude.repeat(count // size), None
    raise ShapeError(
        f"Integer exclude must have one id for each of the {size} queries, or for each of the {count} docs "
        f"(the only way when their number is no multiple of {size}), got shape {tuple(exclude.shape)}."
    )


def _check_guide(guide: Guide, queries: Tensor, docs: Tensor, spec: ContrastiveSpec) -> None:
    guide.check(queries, docs)
    if "doc_to_query" in spec.directions:
        raise InputError("A guide has a threshold for each query and none for documents: leave out 'doc_to_query'.")


def choose_backend(queries: Tensor, docs: Tensor, spec: ContrastiveSpec, similarities: int | None = None) -> str:
    """The backend for a call that was checked; `similarities` is the size that counts, by default that of the call."""
    if queries.numel() == 0:
        return "reference"  # whatever is asked for: without numbers there are no blocks, and the result is known
    # of mixed inputs the wider one decides, for they are computed in its dtype
    widest = queries if queries.element_size() >= docs.element_size() else docs
    if similarities is None:
        similarities = len(queries) * len(docs)
        # both directions of one matrix are walked twice, which on a CPU pays from 512 x 512 on
        if widest.is_cpu and len(spec.directions) == 2 and "doc_to_query" in spec.directions:
            similarities //= 4
    return choose(widest, similarities, _obstacles(spec, queries, docs)).backend


def _obstacles(spec: ContrastiveSpec, queries: Tensor, docs: Tensor) -> dict[str, str]:
    """Why a backend cannot serve this call."""
    if not is_rowwise(spec.similarity):
        reason = f"the similarity {spec.similarity!r} is none of the four known ones nor declared by tileloss.rowwise"
        return dict.fromkeys(("tiled", "triton"), reason)
    if isinstance(spec.similarity, str):
        return {}
    if spec.similarity(queries[:1].detach(), docs[:1].detach()).requires_grad:
        reason = f"the similarity {spec.similarity!r} has parameters, whose gradients row blocks do not collect"
        return dict.fromkeys(("tiled", "triton"), reason)
    return {"triton": f"the similarity {spec.similarity!r} is a Python function, for autograd to follow in row blocks"}
