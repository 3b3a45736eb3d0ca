"""Measure a step of CachedMultipleNegativesRankingLoss, ours beside sentence-transformers', at several mini-batches.

The model is a table of word vectors whose mean is the embedding, so that the loss is most of the step. Time is of a
whole step, in turns; memory is the most that PyTorch allocates at one time in the stage between the two embeddings,
where loss and gradients of the embeddings are computed. Run as

    python -P benchmarks/gradient_cache.py --out benchmarks/results/gradient_cache.json

It takes about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tileloss import losses
from tileloss.bench.measure import cpu_peak, time_in_turns
from tileloss.bench.report import leave

WORDS, LENGTH, COLUMNS = 2_000, 16, 2


class MeanOfWords(nn.Module):
    """Texts of equally many words, embedded without a transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(WORDS, width, mode="mean")

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features | {"sentence_embedding": self.words(features["input_ids"])}


def stepper(loss: nn.Module, rows: int) -> Callable[[], None]:
    """A step on one batch of random texts."""
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randint(WORDS, (rows, LENGTH), generator=generator) for _ in range(COLUMNS)]

    def step() -> None:
        loss.zero_grad()
        loss([{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in columns], None).backward()

    return step


def stage(loss: Any, rows: int, width: int, mini_batch: int) -> Callable[[], None]:
    """Loss and gradients of given embeddings, cut into mini-batches as the first stage leaves them."""
    torch.manual_seed(0)
    columns = [torch.randn(rows, width).split(mini_batch) for _ in range(COLUMNS)]

    def run() -> None:
        reps = [[x.detach().requires_grad_() for x in column] for column in columns]
        loss.calculate_loss(reps, None, with_backward=True)

    return run


def measure(rows: int, width: int, mini_batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step, bytes of the stage between, and what ours is of theirs."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss as Stock

    kinds = {"sentence-transformers": Stock, "tileloss": losses.CachedMultipleNegativesRankingLoss}
    built = {name: kind(nn.Sequential(MeanOfWords(width)), mini_batch_size=mini_batch) for name, kind in kinds.items()}
    steps = {name: stepper(loss, rows) for name, loss in built.items()}
    for step in steps.values():
        step()
    seconds = {name: statistics.median(taken) for name, taken in time_in_turns(steps, rounds).items()}
    peaks = {}
    for name, loss in built.items():
        run = stage(loss, rows, width, mini_batch)
        run()
        peaks[name] = cpu_peak(run)
    return {
        "mini_batch": mini_batch,
        "seconds": seconds,
        "peak_bytes": peaks,
        "speedup": seconds["sentence-transformers"] / seconds["tileloss"],
        "memory": peaks["tileloss"] / peaks["sentence-transformers"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the figures")
    parser.add_argument("--rows", type=int, default=4096, help="rows of the batch")
    parser.add_argument("--width", type=int, default=384, help="width of the embeddings")
    parser.add_argument("--mini_batch", type=int, nargs="+", default=[32, 256, 4096], help="rows embedded at a time")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each implementation, at least")
    options = parser.parse_args()
    figures = {
        "rows": options.rows,
        "width": options.width,
        "cases": [measure(options.rows, options.width, n, options.rounds) for n in options.mini_batch],
    }
    leave(figures, options.out)


if __name__ == "__main__":
    main()
