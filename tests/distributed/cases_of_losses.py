"""Loss classes over several processes: the oracle's values, and under DDP the gradients of one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from batches import CROSS, Batch, case, compare_outcomes, gradient, mean, small_pieces
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import tileloss
from tileloss.errors import InputError
from tileloss.losses import (
    BatchAllTripletLoss,
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    CachedMultipleNegativesSymmetricRankingLoss,
    CoSENTLoss,
    CosineSimilarityLoss,
    MatryoshkaLoss,
    MegaBatchMarginLoss,
    MSELoss,
    MultipleNegativesRankingLoss,
    MultipleNegativesSymmetricRankingLoss,
    SoftmaxLoss,
    TripletLoss,
)
from tileloss.losses.guided import GuidedLoss
from tileloss.own_parameters import OwnParameters
from tileloss.spec import DIRECTIONS


@case
def the_oracles_ranking_loss() -> None:
    if dist.get_world_size() > 2:
        return  # two show it, and it is slow to import
    from sentence_transformers.sentence_transformer import losses as oracle

    objectives: list[dict[str, Any]] = [
        {},
        {"directions": CROSS, "partition_mode": "per_direction"},
        {"directions": DIRECTIONS, "hardness_mode": "all_negatives", "hardness_strength": 2.0},
    ]
    batch = Batch.random(3)
    for options in objectives:
        theirs = oracle.MultipleNegativesRankingLoss(nn.Identity(), gather_across_devices=True, **options)
        expected = through_class(theirs, batch.part)
        for gather, backend in ((True, "reference"), ("gather", "tiled"), ("ring", "tiled")):
            ours = MultipleNegativesRankingLoss(nn.Identity(), gather_across_devices=gather, **options)
            with tileloss.use_backend(backend):
                compare_outcomes(through_class(ours, batch.part), expected)
            assert ours.get_config_dict() == theirs.get_config_dict() | {"gather_across_devices": gather}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = oracle.MultipleNegativesSymmetricRankingLoss(nn.Identity(), gather_across_devices=True)
        ours = MultipleNegativesSymmetricRankingLoss(nn.Identity(), gather_across_devices="ring")
    compare_outcomes(through_class(ours, batch.part), through_class(theirs, batch.part))


def through_class(loss: nn.Module, columns: list[Tensor]) -> list[Tensor]:
    leaves = [column.clone().requires_grad_() for column in columns]
    value = loss.compute_loss_from_embeddings(leaves, None)  # type: ignore[operator]
    value.backward()
    return [value.detach(), *map(gradient, leaves)]


class Lookup(nn.Module):
    """A model whose embeddings are given."""

    def __init__(self, columns: list[Tensor]) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features | {"sentence_embedding": self.columns[features["column"]]}


@case
def the_oracles_guided_loss() -> None:
    """The anchors stay in their process, the positives and negatives do not."""
    if dist.get_world_size() > 2:
        return  # two show it, and it is slow to import
    from sentence_transformers.sentence_transformer import losses as oracle

    for columns, anchors, positives, strategy in ((3, True, True, "relative"), (2, True, False, "absolute")):
        batch, guide = Batch.random(columns), Batch.random(columns, width=4)
        settings = guided_settings() | {
            "margin_strategy": strategy, "contrast_anchors": anchors, "contrast_positives": positives
        }  # fmt: skip
        theirs, ours = bare(oracle.GISTEmbedLoss, settings), bare(GuidedLoss, settings)
        leaves = [column.requires_grad_() for column in batch.part]
        theirs.model, theirs.guide = Lookup(leaves), Lookup(guide.part)
        loss = theirs([{"column": index} for index in range(columns)], None)
        expected = [loss.detach(), *torch.autograd.grad(loss, leaves)]
        for gather, backend in ((True, "reference"), ("gather", "tiled"), ("ring", "tiled")):
            ours.gather_across_devices = gather
            with tileloss.use_backend(backend), small_pieces():
                value = ours.loss_of_columns(leaves, guide.part)
            compare_outcomes([value.detach(), *torch.autograd.grad(value, leaves)], expected)
        settings |= {"mini_batch_size": 4, "show_progress_bar": False}
        expected = through_the_cache(bare(oracle.CachedGISTEmbedLoss, settings), batch.part, guide.part)
        for gather in (True, "ring"):
            ours = bare(CachedGISTEmbedLoss, settings | {"gather_across_devices": gather})
            compare_outcomes(through_the_cache(ours, batch.part, guide.part), expected)


class Halved(nn.CosineSimilarity):
    """A similarity that is no setting of the stock one."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return 0.5 * super().forward(a, b)


REPLACED: list[dict[str, Any]] = [
    {"similarity_fct": Halved(dim=-1), "margin": 0.1},
    # nothing is ruled out, because smoothing spreads over what is
    {"cross_entropy_loss": nn.CrossEntropyLoss(label_smoothing=0.1), "margin": -10.0},
]


@case
def the_oracles_guided_loss_by_replaced_functions() -> None:
    if dist.get_world_size() > 2:
        return  # two show it, and it is slow to import
    from sentence_transformers.sentence_transformer import losses as oracle

    batch, guide = Batch.random(3), Batch.random(3, width=4)
    leaves = [column.requires_grad_() for column in batch.part]
    for replaced in REPLACED:
        settings = guided_settings() | replaced
        theirs, ours = bare(oracle.GISTEmbedLoss, settings), bare(GuidedLoss, settings)
        theirs.model, theirs.guide = Lookup(leaves), Lookup(guide.part)
        loss = theirs([{"column": index} for index in range(3)], None)
        expected = [loss.detach(), *torch.autograd.grad(loss, leaves)]
        value = ours.loss_of_columns(leaves, guide.part)
        compare_outcomes([value.detach(), *torch.autograd.grad(value, leaves)], expected)
        settings |= {"mini_batch_size": 4, "show_progress_bar": False}
        theirs, ours = bare(oracle.CachedGISTEmbedLoss, settings), bare(CachedGISTEmbedLoss, settings)
        expected = through_the_cache(theirs, batch.part, guide.part)
        compare_outcomes(through_the_cache(ours, batch.part, guide.part), expected)


@case
def a_guided_loss_by_replaced_functions_over_parts_of_different_sizes() -> None:
    batch, guide = Batch.random(3, even=False), Batch.random(3, even=False, width=4)
    for replaced in REPLACED:
        # anchors are compared with those of the process, so without them the mean over processes is the whole
        settings = guided_settings() | {"contrast_anchors": False} | replaced
        columns = [column.clone().requires_grad_() for column in batch.columns]
        whole = bare(GuidedLoss, settings | {"gather_across_devices": False}).loss_of_columns(columns, guide.columns)
        whole.backward()
        leaves = [column.requires_grad_() for column in batch.part]
        value = bare(GuidedLoss, settings).loss_of_columns(leaves, guide.part)
        value.backward()
        found = [mean(value.detach()), *(gradient(x) / dist.get_world_size() for x in leaves)]
        compare_outcomes(found, [whole.detach(), *(gradient(x)[batch.rows] for x in columns)])


@case
def a_function_that_one_process_replaced_is_an_error_in_all() -> None:
    batch, guide = Batch.random(2), Batch.random(2, width=4)
    loss = bare(GuidedLoss, guided_settings() | (REPLACED[0] if dist.get_rank() == 0 else {"margin": 0.1}))
    with pytest.raises(InputError, match="process 0 has gather for replaced functions"):
        loss.loss_of_columns(batch.part, guide.part)


def guided_settings() -> dict[str, Any]:
    return {
        "temperature": 0.25, "margin_strategy": "absolute", "margin": 0.1, "contrast_anchors": True,
        "contrast_positives": True, "gather_across_devices": True, "must_retokenize": False,
        "similarity_fct": nn.CosineSimilarity(dim=-1), "cross_entropy_loss": nn.CrossEntropyLoss(),
    }  # fmt: skip


def through_the_cache(loss: nn.Module, columns: list[Tensor], guide_columns: list[Tensor]) -> list[Tensor]:
    reps = [[part.detach().clone().requires_grad_() for part in column.split(4)] for column in columns]
    guided = [list(column.split(4)) for column in guide_columns]
    value, gradients = loss.calculate_loss_and_cache_gradients(reps, guided)  # type: ignore[operator]
    return [value.detach(), *map(torch.cat, gradients)]


def bare(kind: type[nn.Module], settings: dict[str, Any]) -> Any:
    """An object of a loss class, without the tokenizers that its constructor asks for."""
    loss = kind.__new__(kind)
    nn.Module.__init__(loss)
    for name, value in settings.items():
        setattr(loss, name, value)
    return loss


class Encoder(nn.Module):
    """A model with dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 5)).double()

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features | {"sentence_embedding": self.layers(features["inputs"])}

    def get_embedding_dimension(self) -> int:
        return 5


def train_once(loss: nn.Module, inputs: list[Tensor], labels: Tensor | None = None) -> list[Tensor]:
    torch.manual_seed(dist.get_rank())
    value = loss([{"inputs": x} for x in inputs], labels)
    value.backward()
    return [value.detach(), *map(gradient, loss.parameters())]


@case
def parameters_under_ddp_learn_what_they_would_in_one_process() -> None:
    batch = Batch.random(3, False, width=6)
    plain = {"directions": DIRECTIONS}
    for kind, options in (
        (MultipleNegativesRankingLoss, plain),
        (CachedMultipleNegativesRankingLoss, plain | {"mini_batch_size": 4}),
        (CachedMultipleNegativesSymmetricRankingLoss, {"mini_batch_size": 4}),
    ):
        for gather in (True, "gather", "ring"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                whole = train_once(kind(Encoder(0.0), **options), batch.columns)
                model = DistributedDataParallel(Encoder(0.0))
                loss = kind(model, gather_across_devices=gather, **options)
            with tileloss.use_backend("auto" if gather is True else "tiled"):
                found = train_once(loss, batch.part)
            found[0] = mean(found[0])
            compare_outcomes(found, whole)


@case
def a_sharded_model_learns_what_it_would_in_one_process() -> None:
    """With `fully_shard`, which averages gradients as DistributedDataParallel does, and waits for all in every pass.

    The parts are of different numbers of mini-batches.
    """
    batch = Batch.random(2, False, width=6)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for kind, options in (
        (MultipleNegativesRankingLoss, {}),
        (CachedMultipleNegativesRankingLoss, {"mini_batch_size": 4}),
    ):
        whole = train_once(kind(Encoder(0.0), **options), batch.columns)
        loss = kind(fully_shard(Encoder(0.0), mesh=mesh), gather_across_devices=True, **options)
        value, *gradients = train_once(loss, batch.part)
        compare_outcomes([mean(value), *(x.full_tensor() for x in gradients if isinstance(x, DTensor))], whole)


@case
def losses_of_every_kind_train_a_sharded_model_as_one_under_ddp() -> None:
    batch = Batch.random(3, width=6)
    scores, classes = torch.rand(7, dtype=torch.float64), torch.arange(7) % 3
    kinds: list[tuple[Callable[[nn.Module], nn.Module], int, Tensor | None]] = [
        (lambda model: MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), [5, 3]), 2, None),
        (lambda model: MatryoshkaLoss(model, CachedMultipleNegativesRankingLoss(model), [5, 3]), 2, None),
        (lambda model: MegaBatchMarginLoss(model, mini_batch_size=3), 2, None),
        (TripletLoss, 3, None),
        (BatchAllTripletLoss, 1, classes),
        (CoSENTLoss, 2, scores),
        (CosineSimilarityLoss, 2, scores),
        (lambda model: SoftmaxLoss(model, 5, 3).double(), 2, classes),
        (MSELoss, 1, torch.ones(7, 5, dtype=torch.float64)),
    ]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for make, columns, labels in kinds:
        found = []
        for wrap in (DistributedDataParallel, lambda model: fully_shard(model, mesh=mesh)):
            torch.manual_seed(0)
            model = Encoder(0.0)
            loss = make(model)
            wrapped = wrap(model)
            for part in list(loss.modules()):  # as trainers do
                for name, child in part.named_children():
                    if child is model:
                        setattr(part, name, wrapped)
            gradients = train_once(loss, batch.part[:columns], labels)
            found.append([x.full_tensor() if isinstance(x, DTensor) else x for x in gradients])
        compare_outcomes(*found)


@case
def a_cached_loss_that_is_itself_sharded_is_refused() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    loss = fully_shard(CachedMultipleNegativesRankingLoss(Encoder(0.0)), mesh=mesh)
    with pytest.raises(InputError, match="Give fully_shard the model and not the loss"):
        loss([{"inputs": x} for x in Batch.random(2, width=6).part], None)


@case
def prefixes_of_gathered_embeddings() -> None:
    batch = Batch.random(2, False, width=6)
    found = []
    for gather, columns in ((False, batch.columns), ("ring", batch.part)):
        model = Encoder(0.0)
        ranking = MultipleNegativesRankingLoss(model, gather_across_devices=gather)
        found.append(train_once(MatryoshkaLoss(model, ranking, [5, 3]), columns))
    compare_outcomes([mean(x) for x in found[1]], found[0])


@case
def a_cached_loss_draws_the_same_dropout_again() -> None:
    """With mini-batches of whole columns, masks are drawn as without a cache, and so the gradients are the same."""
    batch = Batch.random(2, width=6)
    found = []
    for kind in (MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss):
        model = DistributedDataParallel(Encoder(0.3))
        found.append(train_once(kind(model, gather_across_devices="ring"), batch.part))
    compare_outcomes(*found)


@case
def what_losses_own_stays_together() -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    model = nn.Linear(2, 2)
    heads = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in ("of_all", "of_one", "of_none")})
    losses = {"first": nn.ModuleDict({"model": model, **heads}), "second": nn.Sequential(model, heads["of_all"])}
    own = OwnParameters(losses, model)
    assert list(own) == [f"first.{name}.weight" for name in heads]
    with torch.no_grad():
        for parameter in own.values():
            parameter.fill_(rank + 1.0)
    own.broadcast()
    assert all(parameter.eq(1.0).all() for parameter in own.values())
    heads["of_all"].weight.grad = torch.full((1, 2), rank + 1.0)
    if rank == 1:
        heads["of_one"].weight.grad = torch.ones(1, 2)
    own.average_gradients()
    torch.testing.assert_close(heads["of_all"].weight.grad, torch.full((1, 2), (processes + 1) / 2))
    torch.testing.assert_close(heads["of_one"].weight.grad, torch.full((1, 2), 1 / processes))
    assert heads["of_none"].weight.grad is None
    assert model.weight.grad is None
