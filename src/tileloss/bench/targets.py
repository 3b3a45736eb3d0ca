"""What tileloss promises against sentence-transformers, and the judgement whether a run kept it.

The promises hold for two CPU cores and float32, forward and backward. Times are medians, measured in turns in
one process, and still depend on the machine and on what else it does; peaks are measured in a process each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tileloss.bench.contestants import FLOOR, SENTENCE_TRANSFORMERS, TILELOSS
from tileloss.bench.report import peak, ratio
from tileloss.bench.sweep import Outcome, Results
from tileloss.bench.workloads import Case


@dataclass(frozen=True)
class Target:
    """One promise.

    Attributes:
        workload, batch: of which work.
        speed_up: at least this many times as fast as sentence-transformers.
        memory: at most this share of its extra peak memory; None: no promise.
        floor: at most this many times the time of the three matrix products; None: no promise.
        width: the numbers of an embedding, D.
    """

    workload: str
    batch: int
    speed_up: float
    memory: float | None = None
    floor: float | None = None
    width: int = 384

    @property
    def case(self) -> Case:
        """The case that shows whether it is kept."""
        return Case(self.workload, self.batch, self.width)


# losses that read pairs, or tuples, of rows and compare no others, and the share of memory: half, or, where the
# gradients of the inputs (which are in every figure) are more than that by themselves, little beside them
PAIR_LOSSES = {
    "cosine_similarity": 1 / 2,
    "contrastive": 1 / 2,
    "online_contrastive": 1 / 2,
    "embed_distill": 1 / 2,
    "softmax": 1 / 2,
    "mse": 0.55,
    "triplet": 0.65,
    "margin_mse": 0.8,
    "distill_kl_div": 0.9,
    "tension": 1.05,
}

TARGETS = (
    Target("default", 8192, speed_up=2.0, memory=1 / 8, floor=1.3),
    Target("hardness", 4096, speed_up=2.0, memory=1 / 5),
    Target("four_directions", 4096, speed_up=2.5, memory=1 / 8),
    Target("symmetric", 4096, speed_up=2.0, memory=1 / 5),
    Target("hard_negatives", 2048, speed_up=1.7, memory=1 / 5),
    Target("default", 512, speed_up=1.0, memory=1.0),
    Target("default", 32, speed_up=1.0, memory=1.0),
    Target("batch_all_large_classes", 1024, speed_up=30.0, memory=1 / 20),
    Target("batch_all", 4096, speed_up=8.0, memory=1 / 20),
    Target("batch_hard", 4096, speed_up=4.0, memory=1 / 5),
    Target("semi_hard", 2048, speed_up=5.0, memory=1 / 5),
    Target("mega_batch", 4096, speed_up=2.5, memory=1 / 4),
    Target("gist", 256, speed_up=100.0, memory=1 / 50),
    Target("matryoshka", 2048, speed_up=5.0, memory=1 / 5, width=768),
    Target("orthogonal", 4096, speed_up=20.0, memory=1 / 10),
    Target("cosent", 16384, speed_up=1.2, memory=1 / 2),
    *(Target(name, 4096, speed_up=1.3, memory=share, width=768) for name, share in PAIR_LOSSES.items()),
    Target("batch_all", 64, speed_up=1.0),
    Target("batch_hard", 64, speed_up=1.0),
    Target("semi_hard", 64, speed_up=1.0),
    Target("mega_batch", 64, speed_up=1.0),
    *(Target(name, 32, speed_up=1.0) for name in ("matryoshka", "tension_in_batch", "orthogonal", "cosent", "angle")),
    *(Target(name, 32, speed_up=1.0) for name in PAIR_LOSSES),
)


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured of tileloss, of sentence-transformers and of the floor."""

    target: Target
    ours: Outcome
    theirs: Outcome
    floor: Outcome

    @property
    def speed_up(self) -> float | None:
        """How many times as fast as sentence-transformers; None without both figures, as below."""
        return ratio(self.theirs.seconds, self.ours.seconds)

    @property
    def memory(self) -> float | None:
        """Which share of its extra peak memory."""
        return ratio(peak(self.ours), peak(self.theirs))

    @property
    def times_floor(self) -> float | None:
        """How many times as long as the three matrix products; None too for a loss that has none."""
        return ratio(self.ours.seconds, self.floor.seconds)

    @property
    def reached(self) -> bool:
        """Whether every part of the promise is kept; without a figure it is not."""
        if self.speed_up is None or self.memory is None:
            return False
        floor, measured = self.target.floor, self.times_floor
        within_floor = floor is None or (measured is not None and measured <= floor)
        within_memory = self.target.memory is None or self.memory <= self.target.memory
        return self.speed_up >= self.target.speed_up and within_memory and within_floor

    def record(self) -> dict[str, Any]:
        """The verdict for the JSON file."""
        measured = {"speed_up": self.speed_up, "memory": self.memory, "floor": self.times_floor}
        return {"target": vars(self.target), "measured": measured, "reached": self.reached}


def judge(results: Results) -> list[Verdict]:
    """Hold the results of the targets' cases against the targets, in their order."""
    return [
        Verdict(target, *(results[target.case][name] for name in (TILELOSS, SENTENCE_TRANSFORMERS, FLOOR)))
        for target in TARGETS
    ]


def verdict_table(verdicts: list[Verdict]) -> str:
    """One line per target: measured, and in brackets what was promised."""
    lines = [f"{'target':<32} {'ms, theirs -> ours':>20} {'speed-up':>14} {'memory':>16} {'x floor':>14}  reached"]
    for verdict in verdicts:
        target = verdict.target
        lines.append(
            f"{f'{target.workload}, B={target.batch}':<32}"
            f" {f'{_milliseconds(verdict.theirs)} -> {_milliseconds(verdict.ours)}':>20}"
            f" {_pair(verdict.speed_up, f'>= {target.speed_up:g}'):>14}"
            f" {_pair(verdict.memory, f'<= {target.memory:g}' if target.memory else ''):>16}"
            f" {_pair(verdict.times_floor, f'<= {target.floor:g}' if target.floor else ''):>14}"
            f"  {'yes' if verdict.reached else 'no'}"
        )
    return "\n".join(lines)


def _milliseconds(outcome: Outcome) -> str:
    return "-" if outcome.seconds is None else f"{1e3 * outcome.seconds:.4g}"


def _pair(measured: float | None, promised: str) -> str:
    shown = "-" if measured is None else f"{measured:.3g}"
    return f"{shown} ({promised})" if promised else shown
