"""One step of a loss, tile by tile and materialised, measured side by side on the same embeddings."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from tileloss.backend import requested, use_backend
from tileloss.bench.measure import accelerator_peak, available_memory, cpu_peak, time_in_turns
from tileloss.losses import BatchAllTripletLoss
from tileloss.losses.columns import embed_columns

logger = logging.getLogger(__name__)

# similarities, scaled logits, their softmax and its gradient are alive together in the materialised form; of triplets,
# the differences, what is left of them above zero, and the gradients of both
MATERIALISED_MATRICES = 4


@dataclass(frozen=True)
class StepCost:
    """What one forward and backward of a loss costs, from the embeddings to their gradients.

    Attributes:
        seconds: median of the measured steps.
        peak_bytes: the most that torch held beyond the embeddings, their gradients included; None where torch does not
            tell for this device.
    """

    seconds: float
    peak_bytes: int | None

    def __str__(self) -> str:
        memory = "memory not measured" if self.peak_bytes is None else f"{self.peak_bytes / 2**20:,.1f} MiB"
        return f"{self.seconds * 1e3:,.1f} ms, {memory}"


@torch.no_grad()
def _leaves(model: nn.Module, features: Sequence[dict[str, Any]]) -> list[Tensor]:
    training = model.training
    model.eval()
    columns = embed_columns(model, [dict(column) for column in features])
    model.train(training)
    return [column.detach().clone().requires_grad_() for column in columns]


def _peak(step: Callable[[], None], device: torch.device) -> int | None:
    # the profiler's own notes would run through the output
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        return cpu_peak(step) if device.type == "cpu" else accelerator_peak(step)
    except (RuntimeError, NotImplementedError) as error:
        logger.warning("Peak memory is not measured on %s: %s", device, error)
        return None


def _entries(leaves: Sequence[Tensor]) -> int:
    """Entries of the matrix of the first column by all others."""
    return len(leaves[0]) * sum(map(len, leaves[1:]))


def _mined_entries(loss: Any, labels: Tensor | None) -> int:
    """Entries of the largest array that a mined loss would hold: distances, or a distance for every triplet."""
    counts = cast(Tensor, labels).unique(return_counts=True)[1]
    size = int(counts.sum())
    pairs = int((counts * (counts - 1)).sum())
    return pairs * size if isinstance(loss, BatchAllTripletLoss) else size * size


def compare_with_materialised(
    loss: Any, features: Sequence[dict[str, Any]], labels: Tensor | None = None, *, rounds: int = 5
) -> dict[str, StepCost]:
    """Time and peak memory of `loss` on the embeddings of one batch: {"tileloss": ..., "materialised": ...}.

    "materialised" is the same loss on the "reference" backend: the similarities as one matrix under autograd. The two
    take turns in this process, after a warm-up; memory is what torch's own allocator held, in a step of its own. Where
    the matrices would not fit into free memory, "materialised" is left out, and that is logged.

    Args:
        loss: a loss of `tileloss.losses` that has `compute_loss_from_embeddings`.
        features: the feature dicts of the batch, on the device of the model.
        labels: as the loss takes them.
        rounds: turns of each, at least.
    """
    # the mined losses name their model as sentence-transformers' do, and embed the first column only
    mined = hasattr(loss, "sentence_embedder")
    leaves = _leaves(loss.sentence_embedder, features[:1]) if mined else _leaves(loss.model, features)
    device = leaves[0].device

    def clear() -> None:
        # what an earlier step left behind must not be freed inside a measured one
        loss.stats = None
        for leaf in leaves:
            leaf.grad = None

    def step_on(backend: str) -> Callable[[], None]:
        def step() -> None:
            clear()
            with use_backend(backend):
                loss.compute_loss_from_embeddings(leaves, labels).backward()

        return step

    steps = {"tileloss": step_on(requested())}
    needed = 4 * MATERIALISED_MATRICES * (_mined_entries(loss, labels) if mined else _entries(leaves))
    free = available_memory(device.type)
    if free is not None and needed > free:
        logger.warning(
            "The materialised form is not measured: it needs some %.0f GiB, and %.0f GiB are free.",
            needed / 2**30,
            free / 2**30,
        )
    else:
        steps["materialised"] = step_on("reference")
    peaks = {}
    for name, step in steps.items():
        step()
        clear()
        peaks[name] = _peak(step, device)
    seconds = time_in_turns(steps, rounds)
    return {name: StepCost(median(seconds[name]), peaks[name]) for name in steps}
