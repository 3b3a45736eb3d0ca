"""Measure how far losses and gradients lie from float64: ours, and those of sentence-transformers.

The truth is sentence-transformers' own loss in float64, on the very numbers that the narrower dtype holds; so what is
measured is the arithmetic, and not the rounding of the inputs. The error of a loss is relative; that of gradients is
the length of the difference relative to the length of the truth, over all embeddings of the batch together. Several
batches are measured, because the error of a single number is a matter of luck. The cosine of a query and its document,
or of two texts of one class, is about 0.2, so that no loss is that of chance and few are nearly zero.

Beside that, what a product of float32 matrices is off by: in PyTorch, and by what multiplies the blocks here, which
may be another library (`tileloss.tiled.onednn`).

A loss that mines may find two negatives, within rounding, in the other order and take another triplet than in float64:
a step in the gradients, and a rare one. How rare is counted over many batches of semi-hard triplets. Run as

    python -P benchmarks/numerics.py --out benchmarks/results/numerics.json

It takes two to five minutes on two cores. It needs no quiet machine: two runs on one machine give the same figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tileloss.bench.contestants import CONTESTANTS, SENTENCE_TRANSFORMERS, TILELOSS
from tileloss.bench.report import leave
from tileloss.bench.workloads import DTYPES, WORKLOADS, Workload
from tileloss.tiled.matmul import multiply

MEASURED = ("float32", "bfloat16")
WIDTH = 384
SEEDS = range(5)
MANY = range(200)
ROUNDING = 1e-5  # far above the rounding of float32 gradients, far below what one triplet of thousands weighs
COSINE = 0.2
BATCH = 512
SMALLER = {"gist": 320, "batch_all_large_classes": 320}  # what sentence-transformers holds of them in float64


@dataclasses.dataclass(frozen=True)
class Rounded(Workload):
    """A workload whose labels and guide are those of columns in `dtype`, also for the same columns in float64."""

    dtype: torch.dtype = torch.float32

    def _rounded(self, columns: Sequence[Tensor]) -> list[Tensor]:
        return [column.detach().to(self.dtype) for column in columns]

    def labels(self, columns: Sequence[Tensor]) -> Any:
        def widened(x: Tensor) -> Tensor:
            return x.to(torch.promote_types(x.dtype, columns[0].dtype)) if x.is_floating_point() else x

        labels = super().labels(self._rounded(columns))
        return (
            [widened(x) for x in labels] if isinstance(labels, list) else labels if labels is None else widened(labels)
        )

    def features(self, columns: Sequence[Tensor]) -> list[dict[str, Any]]:
        made = super().features(self._rounded(columns))
        return [
            {name: x.to(column) for name, x in own.items()} | {"sentence_embedding": column}
            for own, column in zip(made, columns, strict=True)
        ]


def embeddings(workload: Workload, batch: int, seed: int) -> list[Tensor]:
    """Columns (B, D) in float64, of length about one: part of a row is its text's, or its class', the rest noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, share: float) -> Tensor:
        return torch.randn(rows, WIDTH, dtype=torch.float64, generator=generator) * math.sqrt(share / WIDTH)

    texts = max(batch // workload.per_class, 1) if workload.per_class else batch
    shared = normal(texts, COSINE)[torch.arange(batch) % texts]
    return [shared + normal(batch, 1 - COSINE) for _ in range(workload.columns)]


def loss_and_gradients(loss: Any, columns: Sequence[Tensor]) -> tuple[float, Tensor]:
    """The loss, and the gradients of all columns as one vector, in float64."""
    leaves = [column.detach().clone().requires_grad_() for column in columns]
    value = loss(leaves)
    value.backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return value.item(), torch.cat([gradient.double().flatten() for gradient in gradients])


def errors(workload: Rounded, batch: int, seed: int) -> dict[str, dict[str, float]]:
    """Of both libraries on one batch, against the truth."""
    columns = [column.to(workload.dtype) for column in embeddings(workload, batch, seed)]
    theirs = CONTESTANTS[SENTENCE_TRANSFORMERS].build(workload)
    found = {
        TILELOSS: loss_and_gradients(CONTESTANTS[TILELOSS].build(workload), columns),
        SENTENCE_TRANSFORMERS: loss_and_gradients(theirs, columns),
    }
    # after the narrow run, so that a layer that the loss adds has been rounded as it was there
    truth, true_gradients = loss_and_gradients(theirs, [column.double() for column in columns])
    return {
        name: {
            "loss": abs(value - truth) / abs(truth),
            "gradients": ((gradients - true_gradients).norm() / true_gradients.norm()).item(),
        }
        for name, (value, gradients) in found.items()
    } | {"float64": {"loss": truth}}


def case(workload: Workload, dtype: str) -> dict[str, Any]:
    """The record of a workload in a dtype."""
    batch = SMALLER.get(workload.name, BATCH)
    rounded = Rounded(**vars(workload), dtype=DTYPES[dtype])
    return {
        "workload": workload.name,
        "batch": batch,
        "width": WIDTH,
        "dtype": dtype,
        "batches": [errors(rounded, batch, seed) for seed in SEEDS],
    }


def other_triplets() -> dict[str, Any]:
    """In how many batches the gradients of semi-hard triplets are off by more than rounding."""
    rounded = Rounded(**vars(WORKLOADS["semi_hard"]), dtype=torch.float32)
    found = [errors(rounded, BATCH, seed) for seed in tqdm(MANY, unit="batch")]
    counts = {
        name: sum(batch[name]["gradients"] > ROUNDING for batch in found) for name in (TILELOSS, SENTENCE_TRANSFORMERS)
    }
    return {
        "workload": "semi_hard",
        "batch": BATCH,
        "width": WIDTH,
        "dtype": "float32",
        "batches": len(MANY),
        **counts,
    }


def products() -> dict[str, float]:
    """By how much a product of (512, 384) and (384, 512) in float32 is off, by PyTorch and in the blocks."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(BATCH, WIDTH, generator=generator) for _ in range(2))
    truth = a.double() @ b.double().t()
    found = {"torch.mm": torch.mm(a, b.t()), TILELOSS: multiply(a, b.t(), out=torch.empty(BATCH, BATCH))}
    return {name: ((x - truth).norm() / truth.norm()).item() for name, x in found.items()}


def main() -> None:
    """Measure every workload in every dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the figures")
    options = parser.parse_args()
    pairs = list(itertools.product(MEASURED, WORKLOADS.values()))
    figures = {
        "cases": [case(workload, dtype) for dtype, workload in tqdm(pairs, unit="case")],
        "products": products(),
        "other_triplets": other_triplets(),
    }
    leave(figures, options.out)


if __name__ == "__main__":
    main()
