"""In-batch losses over the processes of a distributed run: every query meets the documents of all of them.

Each process has a part of the batch and computes the rows of its own queries. The mean of the processes' losses is the
loss of the whole batch in one process, and so is, after the averaging of DistributedDataParallel, the gradient: a loss
is never to be multiplied by the number of processes. Parts may be of different sizes.

The columns come together in one of two ways, of the same result:

* gather: everyone gets the embeddings of all, and sums for the gradient of all are sent back to their owners. Three
  GEMMs for query_to_doc. A process holds the embeddings and the gradient of the whole batch.
* ring: embeddings travel in chunks from process to process, and their gradients with them. Four GEMMs. A process holds
  those of its own part, and four chunks.

"auto" takes the ring from where gather would hold `RING_FROM_BYTES` in each process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tileloss.agreement import agree
from tileloss.backend import accepts_backend
from tileloss.collectives import GroupPart
from tileloss.errors import InputError, ShapeError
from tileloss.functional import contrastive
from tileloss.functional.contrastive import Call, ContrastiveStats, check_call
from tileloss.functional.contrastive_op import block_loss, wanted
from tileloss.functional.contrastive_part import definition_of_part
from tileloss.similarity import full_precision, similarity_fct_name, up_dtype
from tileloss.tiled.part import Part

EXCHANGES = ("auto", "gather", "ring")
# gathered embeddings and the sums of their gradient in each process: a batch of 65,536 pairs of width 768 in float32
# takes 0.4 GB. Below, gather is faster: it has a GEMM less to do, where doc_to_query does not demand a fourth anyway
RING_FROM_BYTES = 1 << 30
_LARGE = 1 << 62  # a number of similarities for which no backend is too large

logger = logging.getLogger(__name__)
_warned = False


@accepts_backend
def contrastive_loss(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (C * B, D)
    *,
    exchange: str = "auto",
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
    **objective: Any,
) -> Tensor:
    """`tileloss.functional.contrastive_loss` of a batch whose parts are on the processes of a group: one part's share.

    Every process of the group calls it, each with its own part. In a group of one, or in none, it is that function.

    Args:
        queries: (B, D), of this process; B >= 1 may differ between processes.
        docs: (C * B, D), of this process: C whole columns, row c * B + i belonging to query i, and row i < B its
            positive. C is the same everywhere.
        exchange: "gather", "ring", or "auto", which decides by size (see the module).
        group: the processes; by default all.
        **objective: scale, similarity, directions, partition, hardness and exclude, as in
            `tileloss.functional.contrastive_loss`, the same everywhere. Ids in `exclude` are compared across the
            processes; a boolean mask is refused, since it would have to know the documents of the others. With a
            `Guide`, query_to_query stays within each process, as in sentence-transformers, and columns are gathered
            whatever `exchange` says.
        backend: "reference", "tiled", "triton" or "auto", for this call alone; see `tileloss.backend`.

    Returns:
        A 0-dim tensor: the number of processes times this part's share of the batch's mean, so that the mean over the
        processes is the batch's loss. Differentiable in queries, docs and scale; the gradients found are, averaged
        over the processes, those of the batch. They are exchanged in the forward, for a backward in which every
        process scales its loss alike. A second derivative goes through the gathered definition, in O(B W B) memory for
        W processes. A similarity that is a callable and not declared by `tileloss.rowwise` takes it at once.

    Raises:
        ShapeError, DtypeError, DeviceError, InputError: on every process, when the input of one does not fit, or the
            processes disagree on width, columns, dtypes or objective. Nothing has been exchanged then.
        RuntimeError: from torch.distributed, after the group's timeout, when a process does not call.

    Cost:
        By gather, three GEMMs of B x W C B x D, four with doc_to_query, and memory for the columns of all, twice. By
        ring, four, and memory for those of this process, twice, and for four chunks of 512 rows on a CPU, of 8,192 on
        a GPU. One number a row is reduced for doc_to_query. Before all this, 24 bytes a process are gathered and
        waited for.

    Source:
        Local rows against gathered columns: Cherti et al. 2022 (arXiv 2212.07143); columns that go round: Zhai et al.
        2023 (2303.15343), Cheng et al. 2024 (2410.17243).

    >>> queries, docs = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
    >>> contrastive_loss(queries, docs, exchange="ring", directions=("query_to_doc", "doc_to_query")).backward()
    """
    return _contrastive(lambda: {"queries": queries, "docs": docs, **objective}, exchange, group)[0]


@accepts_backend
def contrastive_loss_with_stats(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (C * B, D)
    *,
    exchange: str = "auto",
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
    **objective: Any,
) -> tuple[Tensor, ContrastiveStats]:
    """As `contrastive_loss`, with the statistics of this process's queries among the documents of all beside it."""
    return _contrastive(lambda: {"queries": queries, "docs": docs, **objective}, exchange, group)


def loss_of_batch(
    inputs: Callable[[], dict[str, Any]], gather_across_devices: bool | str
) -> tuple[Tensor, ContrastiveStats]:
    """What a loss class that is to gather calls: the loss of `inputs()`, over all processes if there are several.

    Args:
        inputs: checks the columns and gives the arguments of `tileloss.functional.contrastive_loss`. Over several
            processes, what it raises on one is an error on all.
        gather_across_devices: True for "auto", or one of `EXCHANGES`.
    """
    _warn_of_no_group()
    exchange = gather_across_devices if isinstance(gather_across_devices, str) else "auto"
    return _contrastive(inputs, exchange, None)


def part_of_batch(inputs: Callable[[], dict[str, Any]], gather_across_devices: bool | str) -> Part:
    """The rows of this process in the batch of all, for a loss class that computes its loss by itself.

    Args:
        inputs: as in `loss_of_batch`. They are checked and, if they are to be gathered, compared: nothing else.
        gather_across_devices: if not, or if there are no other processes, this process has the whole batch.
    """
    if gather_across_devices:
        _warn_of_no_group()
    if not (gather_across_devices and is_distributed()):
        return Part(len(inputs()["queries"]))
    return torch.compiler.disable(lambda: GroupPart(_agreed(inputs, "gather for replaced functions", None)[1]))()


def is_distributed(group: dist.ProcessGroup | None = None) -> bool:
    """Whether there are other processes in the group."""
    return _has_group() and dist.get_world_size(group) > 1


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def check_gather(gather_across_devices: bool | str) -> None:
    """Refuse a setting that is neither a truth value nor a way to exchange columns."""
    if isinstance(gather_across_devices, str) and gather_across_devices not in EXCHANGES:
        raise InputError(
            f"gather_across_devices must be True, False or one of {list(EXCHANGES)}, got {gather_across_devices!r}."
        )


def _warn_of_no_group() -> None:
    global _warned
    if not (_has_group() or _warned):
        _warned = True
        logger.warning("gather_across_devices without an initialised process group: the local batch is used.")


def _contrastive(
    inputs: Callable[[], dict[str, Any]], exchange: str, group: dist.ProcessGroup | None
) -> tuple[Tensor, ContrastiveStats]:
    if exchange not in EXCHANGES:
        raise InputError(f"exchange must be one of {list(EXCHANGES)}, got {exchange!r}.")
    if not is_distributed(group):
        return contrastive.contrastive_loss_with_stats(**inputs())
    # no compiler follows an exchange of sizes; told so here, because telling it loads the compiler
    return torch.compiler.disable(_over_processes)(inputs, exchange, group)


def _over_processes(
    inputs: Callable[[], dict[str, Any]], exchange: str, group: dist.ProcessGroup | None
) -> tuple[Tensor, ContrastiveStats]:
    call, sizes = _agreed(inputs, exchange, group)
    columns = len(call.docs) // len(call.queries)
    is_ring = call.guide is None and (exchange == "ring" or (exchange == "auto" and _is_large(call, sizes)))
    # by numbers that all processes know, for all must take the definition or none
    chosen = _backend(call, _LARGE if is_ring else sum(sizes) ** 2 * columns // len(sizes))
    part = GroupPart(sizes, group, is_ring)
    if chosen == "reference":
        with full_precision(call.queries):
            loss, stats = definition_of_part(*call, part)
    else:
        loss, stats = block_loss(*call, chosen, part)
    return loss, ContrastiveStats(*stats.unbind())


def _agreed(
    inputs: Callable[[], dict[str, Any]], exchange: str, group: dist.ProcessGroup | None
) -> tuple[Call, list[int]]:
    """The call of this process, which fits those of the others, and the number of rows of each."""
    return agree(lambda: _checked(**inputs()), lambda call: (len(call.queries), _meaning(call, exchange)), group)


def _checked(**arguments: Any) -> Call:
    """The arguments in the backends' form, refused where they do not fit, alone or in a group."""
    call = check_call(**arguments)
    size, count = len(call.queries), len(call.docs)
    if size == 0:
        raise ShapeError("The batch of this process is empty. Each needs at least one row; drop the last batch.")
    if count % size:
        raise ShapeError(
            f"Columns that are gathered must be whole: the {count} docs of this process are no multiple of its {size} "
            "queries."
        )
    if call.mask is not None:
        raise InputError(
            "A boolean exclude does not know the documents of the other processes; give integer ids, the same for "
            "the same text everywhere."
        )
    _backend(call, _LARGE)  # what it raises is raised before anything is exchanged
    return call


def _meaning(call: Call, exchange: str) -> Mapping[str, Any]:
    """What all processes must have the same, as people would call it."""
    queries, docs, scale, spec, doc_ids, _, guide = call
    return {
        "width": queries.shape[1],
        "document columns": len(docs) // len(queries),
        "dtypes": f"{queries.dtype} and {docs.dtype}",
        "scale": "a tensor" if isinstance(scale, Tensor) else float(scale),
        "similarity": similarity_fct_name(spec.similarity),
        "directions": spec.directions,
        "partition": spec.partition,
        "hardness": (spec.hardness, float(spec.hardness_strength)),
        "ids": None if doc_ids is None else str(doc_ids.dtype),
        "guide": None if guide is None else (guide.docs.shape[1], str(guide.docs.dtype), guide.margin, guide.strategy),
        "exchange": exchange,
        "gradients wanted of queries, docs and scale": tuple(wanted(queries, docs, scale)),
        "use of the definition": _backend(call, _LARGE) == "reference",
    }


def _backend(call: Call, similarities: int) -> str:
    return contrastive.choose_backend(call.queries, call.docs, call.spec, similarities)


def _is_large(call: Call, sizes: list[int]) -> bool:
    """Whether columns and their gradients, gathered, would take more than a process should be asked to hold."""
    columns = len(call.docs) // len(call.queries) + ("query_to_query" in call.spec.directions)
    row = call.docs.shape[1] * (call.docs.element_size() + up_dtype(call.docs.dtype).itemsize)
    return columns * sum(sizes) * row > RING_FROM_BYTES
