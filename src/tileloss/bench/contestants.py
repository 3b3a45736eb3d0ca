"""Who is measured: tileloss by backend, plain PyTorch, torch.compile of it, the libraries next door, and the floor.

A contestant turns a workload into a function of the embedding columns; from then on all of them are measured the same
way. The floor is no contestant but a bound: the three matrix products that no exact method without shortcuts avoids
(the similarities, and each side's gradient), as plain `torch.mm` into buffers that already exist. On a CPU where
another library multiplies faster than `torch.mm`, tileloss can fall below it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

import tileloss.losses
from tileloss.backend import use_backend
from tileloss.bench.workloads import Case, CrossEntropy, Workload, widths
from tileloss.given import Given

Loss = Callable[[list[Tensor]], Tensor]

FLOOR = "matmul floor"
# one block of products stays below this many numbers, so that the floor can be timed where no matrix would fit
_FLOOR_ELEMENTS = 2**30


class Steps(NamedTuple):
    """What is timed: the loss alone under no_grad, and the loss with all gradients, starting from none."""

    forward: Callable[[], None]
    forward_backward: Callable[[], None]


@dataclass(frozen=True)
class Contestant:
    """A way to compute a workload.

    Attributes:
        name: what it is called on the command line and in the results.
        build: gives the loss as a function of the columns; raises if it cannot, with a message that says why.
        materialises: whether its memory grows with B * M (else with B + M), for the prediction of what fits.
    """

    name: str
    build: Callable[[Workload], Loss]
    materialises: bool

    def steps(self, workload: Workload, embeddings: list[Tensor]) -> Steps:
        """The two things to measure, over leaves whose gradients are dropped before each step."""
        loss = self.build(workload)

        def forward() -> None:
            with torch.no_grad():
                loss(embeddings)

        def forward_backward() -> None:
            for leaf in embeddings:
                leaf.grad = None
            loss(embeddings).backward()

        return Steps(forward, forward_backward)


def floor_steps(case: Case, embeddings: Sequence[Tensor]) -> Steps:
    """One product of (B, D) with (D, M) forward; that and the two of the gradients forward and backward."""
    queries = embeddings[0].detach()
    docs = torch.cat([column.detach() for column in embeddings[1:] or embeddings])
    rows = max(1, min(case.batch, _FLOOR_ELEMENTS // case.docs))
    products = queries.new_empty(rows, case.docs)
    query_gradient, doc_gradient = torch.empty_like(queries), torch.empty_like(docs)

    def forward() -> None:
        for block in queries.split(rows):
            torch.mm(block, docs.T, out=products[: len(block)])

    def forward_backward() -> None:
        for block, gradient in zip(queries.split(rows), query_gradient.split(rows), strict=True):
            product = torch.mm(block, docs.T, out=products[: len(block)])
            torch.mm(product, docs, out=gradient)
            torch.mm(product.T, block, out=doc_gradient)

    return Steps(forward, forward_backward)


def _tileloss(workload: Workload) -> Loss:
    return _of_library(tileloss.losses, workload)


def _of_library(losses: ModuleType, workload: Workload) -> Loss:
    """The loss on embeddings that are given, by our class or by sentence-transformers'."""
    loss_class = getattr(losses, workload.loss)
    if workload.prefixes:
        return _at_prefixes(losses.MatryoshkaLoss, loss_class, workload)
    if workload.guided:
        guided = loss_class(Given("sentence_embedding"), Given("guide_embedding"), **workload.options)
        return lambda columns: guided(workload.features(columns), None)
    if workload.width_option is not None:
        return _with_a_layer(loss_class, workload, workload.width_option)
    loss = loss_class(nn.Identity(), **workload.options)
    if not hasattr(loss, "compute_loss_from_embeddings"):
        return lambda columns: loss(workload.features(columns), workload.labels(columns))
    of_embeddings: Callable[..., Tensor | dict[str, Tensor]] = loss.compute_loss_from_embeddings
    return lambda columns: _summed(of_embeddings(columns, workload.labels(columns)))


def _summed(found: Tensor | dict[str, Tensor]) -> Tensor:
    """One number for a loss that gives its terms by name, as trainers make it."""
    return torch.stack(list(found.values())).sum() if isinstance(found, dict) else found


def _with_a_layer(loss_class: type[nn.Module], workload: Workload, width_option: str) -> Loss:
    @functools.cache
    def loss(width: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # everybody's layer has the same weights
            return loss_class(Given("sentence_embedding"), **{width_option: width}, **workload.options)

    def run(columns: list[Tensor]) -> Tensor:
        sized = loss(columns[0].shape[1]).to(columns[0])
        return sized(workload.features(columns), workload.labels(columns))

    return run


def _at_prefixes(outer: type[nn.Module], inner: type[nn.Module], workload: Workload) -> Loss:
    model = Given("sentence_embedding")
    inner_loss = inner(model, **workload.options)

    @functools.cache
    def loss(width: int) -> nn.Module:
        return outer(model, inner_loss, widths(workload.prefixes, width))

    return lambda columns: loss(columns[0].shape[1])(workload.features(columns), workload.labels(columns))


def _tileloss_on(backend: str) -> Callable[[Workload], Loss]:
    def build(workload: Workload) -> Loss:
        loss = _tileloss(workload)

        def run(columns: list[Tensor]) -> Tensor:
            with use_backend(backend):
                return loss(columns)

        return run

    return build


def _plain(workload: Workload) -> Loss:
    if workload.plain is None:
        raise NotImplementedError(f"no plain formula is written for the workload {workload.name!r}")
    return workload.plain


def _compiled(workload: Workload) -> Loss:
    return torch.compile(_plain(workload))


def _sentence_transformers(workload: Workload) -> Loss:
    from sentence_transformers.sentence_transformer import losses

    return _of_library(losses, workload)


def _metric_learning(workload: Workload) -> Loss:
    """pytorch-metric-learning, where it defines a loss as sentence-transformers does: margin 5, Euclidean distance."""
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchHardMiner
    from pytorch_metric_learning.reducers import AvgNonZeroReducer, MeanReducer

    distance = LpDistance(normalize_embeddings=False)
    if workload.loss == "BatchAllTripletLoss":
        miner, reducer = None, AvgNonZeroReducer()
    elif workload.loss == "BatchHardTripletLoss":
        miner, reducer = BatchHardMiner(distance=distance), MeanReducer()
    else:
        raise NotImplementedError(f"pytorch-metric-learning has no {workload.loss} of the same definition")
    loss = TripletMarginLoss(margin=5.0, distance=distance, reducer=reducer, triplets_per_anchor="all")

    def run(columns: list[Tensor]) -> Tensor:
        labels = workload.labels(columns)
        return loss(columns[0], labels, miner(columns[0], labels) if miner else None)

    return run


def _inf_cl(workload: Workload) -> Loss:
    """Inf-CL's softmax over one matrix of similarities, made for CUDA; it computes in float32 whatever the inputs."""
    from inf_cl import cal_flash_loss

    def cross_entropy(inputs: Tensor, classes: Tensor) -> Tensor:
        part = math.gcd(inputs.shape[1], 256)  # it takes the products in parts of so many numbers, a power of two
        return cal_flash_loss(inputs.contiguous(), classes.contiguous(), head_dim=part).mean()

    return _by_cross_entropy("Inf-CL", cross_entropy, workload)


def _liger(workload: Workload) -> Loss:
    """Liger's cross-entropy after a linear layer, with the documents as the layer's weight."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)  # as everybody's sums of gradients

    def cross_entropy(inputs: Tensor, classes: Tensor) -> Tensor:
        return loss(classes, inputs, torch.arange(len(inputs), device=inputs.device))

    return _by_cross_entropy("Liger", cross_entropy, workload)


def _by_cross_entropy(library: str, cross_entropy: CrossEntropy, workload: Workload) -> Loss:
    softmax = workload.softmax
    if softmax is None:
        raise NotImplementedError(f"{library} has no loss for the workload {workload.name!r}")
    return lambda columns: softmax(columns, cross_entropy)


TILELOSS, REFERENCE, SENTENCE_TRANSFORMERS = "tileloss", "tileloss-reference", "sentence-transformers"
METRIC_LEARNING, INF_CL, LIGER = "pytorch-metric-learning", "inf-cl", "liger-kernel"

CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(TILELOSS, _tileloss, materialises=False),
        Contestant(REFERENCE, _tileloss_on("reference"), materialises=True),
        Contestant("tileloss-tiled", _tileloss_on("tiled"), materialises=False),
        Contestant("tileloss-triton", _tileloss_on("triton"), materialises=False),
        Contestant("pytorch", _plain, materialises=True),
        Contestant("torch.compile", _compiled, materialises=True),
        Contestant(SENTENCE_TRANSFORMERS, _sentence_transformers, materialises=True),
        Contestant(METRIC_LEARNING, _metric_learning, materialises=True),
        Contestant(INF_CL, _inf_cl, materialises=False),
        Contestant(LIGER, _liger, materialises=False),
    )
}
