"""What tileloss promises, most of it against sentence-transformers, and the judgement whether a run kept it.

`TARGETS` hold for two CPU cores and float32, `GPU_TARGETS` for one H200, both forward and backward. Times are medians,
measured in turns in one process, and still depend on the machine and on what else it does; peaks are measured in a
process each. A step for whose turns a run had no time is judged by the single reading that goes with its peak.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tileloss.bench.contestants import FLOOR, SENTENCE_TRANSFORMERS, TILELOSS
from tileloss.bench.report import peak, ratio
from tileloss.bench.sweep import Outcome, Results
from tileloss.bench.workloads import DTYPES, WORKLOADS, Case


@dataclass(frozen=True)
class Target:
    """One promise.

    Attributes:
        workload, batch: of which work.
        speed_up: at least this many times as fast as sentence-transformers; None, here and below: no promise.
        memory: at most this share of its extra peak memory.
        floor: at most this many times the time of the three matrix products.
        milliseconds: at most so many.
        megabytes: at most so many millions of bytes beyond the inputs and their gradients.
        width: the numbers of an embedding, D.
        dtype, device: of the embeddings.
    """

    workload: str
    batch: int
    speed_up: float | None = None
    memory: float | None = None
    floor: float | None = None
    milliseconds: float | None = None
    megabytes: float | None = None
    width: int = 384
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def case(self) -> Case:
        """The case that shows whether it is kept."""
        return Case(self.workload, self.batch, self.width, self.dtype, self.device)


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
    *(Target(name, 256, speed_up=1.0) for name in PAIR_LOSSES),
    *(Target(name, 256, speed_up=1.0) for name in ("orthogonal", "cosent", "angle")),
    *(Target(name, 512, speed_up=1.0) for name in ("symmetric", "tension_in_batch", "matryoshka")),
)


def _on_h200(workload: str, batch: int = 32_768, dtype: str = "bfloat16", **promise: float) -> Target:
    return Target(workload, batch, width=768, dtype=dtype, device="cuda", **promise)


SMALL_BATCHES = (32, 64, 128, 256, 512, 1024)

GPU_TARGETS = (
    _on_h200("default", milliseconds=12, speed_up=2.0, megabytes=500),
    _on_h200("default", dtype="float32", speed_up=2.0),
    _on_h200("symmetric", milliseconds=14),
    _on_h200("four_directions", milliseconds=35),
    _on_h200("gist", milliseconds=20),
    _on_h200("matryoshka", milliseconds=25),
    _on_h200("batch_all", milliseconds=18),
    *(_on_h200("default", batch, dtype, speed_up=1.0) for dtype in ("bfloat16", "float32") for batch in SMALL_BATCHES),
    *(
        _on_h200(name, batch, "float32", speed_up=1.0)
        for name in ("symmetric", "gist", "matryoshka", "batch_all", "batch_hard", "semi_hard")
        for batch in (64, 1024)
    ),
    _on_h200("default", 1_048_576, milliseconds=16_000),
)


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured of tileloss, of sentence-transformers and of the floor; each None if nothing.

    Attributes:
        speed_up: how many times as fast as sentence-transformers.
        memory: which share of its extra peak memory.
        floor: how many times as long as the three matrix products; None too for a loss that has none.
        milliseconds: how long a step took.
        megabytes: the extra peak memory, less the gradients of the inputs.
    """

    target: Target
    ours: Outcome
    theirs: Outcome
    speed_up: float | None
    memory: float | None
    floor: float | None
    milliseconds: float | None
    megabytes: float | None

    @property
    def reached(self) -> bool:
        """Whether every part of the promise is kept; without its figure none is."""
        return all(self._kept(name) for name in ("speed_up", *_UPPER_BOUNDS))

    def _kept(self, name: str) -> bool:
        promised, measured = getattr(self.target, name), getattr(self, name)
        if promised is None:
            return True
        return measured is not None and (measured <= promised if name in _UPPER_BOUNDS else measured >= promised)

    def record(self) -> dict[str, Any]:
        """The verdict for the JSON file."""
        measured = {name: getattr(self, name) for name in ("speed_up", *_UPPER_BOUNDS)}
        return {"target": vars(self.target), "measured": measured, "reached": self.reached}


_UPPER_BOUNDS = ("memory", "floor", "milliseconds", "megabytes")


def judge(results: Results, targets: Sequence[Target]) -> list[Verdict]:
    """Hold the results of the targets' cases against the targets, in order; what was not measured has no figure."""
    return [_verdict(target, results.get(target.case, {})) for target in targets]


def _verdict(target: Target, outcomes: Mapping[str, Outcome]) -> Verdict:
    ours, theirs, floor = (outcomes.get(name, Outcome()) for name in (TILELOSS, SENTENCE_TRANSFORMERS, FLOOR))
    single = ours.memory.seconds if ours.memory is not None else None
    seconds, held = ours.seconds or single, peak(ours)
    case = target.case
    gradients = WORKLOADS[case.workload].columns * case.batch * case.width * DTYPES[case.dtype].itemsize
    return Verdict(
        target,
        ours,
        theirs,
        speed_up=ratio(theirs.seconds, ours.seconds),
        memory=ratio(held, peak(theirs)),
        floor=ratio(ours.seconds, floor.seconds),
        milliseconds=None if seconds is None else 1e3 * seconds,
        megabytes=None if held is None else (held - gradients) / 1e6,
    )


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """One line per target: measured, and in brackets what was promised."""
    lines = [
        f"{'target':<40} {'theirs, ms':>10} {'ours, ms':>18} {'speed-up':>14} {'memory':>16} {'MB':>16}"
        f" {'x floor':>14}  reached"
    ]
    for verdict in verdicts:
        target = verdict.target
        lines.append(
            f"{target.case!s:<40}"
            f" {_shown(None if verdict.theirs.seconds is None else 1e3 * verdict.theirs.seconds):>10}"
            f" {_pair(verdict.milliseconds, '<=', target.milliseconds):>18}"
            f" {_pair(verdict.speed_up, '>=', target.speed_up):>14}"
            f" {_pair(verdict.memory, '<=', target.memory):>16}"
            f" {_pair(verdict.megabytes, '<=', target.megabytes):>16}"
            f" {_pair(verdict.floor, '<=', target.floor):>14}"
            f"  {'yes' if verdict.reached else 'no'}"
        )
    return "\n".join(lines)


def _shown(measured: float | None) -> str:
    return "-" if measured is None else f"{measured:.4g}"


def _pair(measured: float | None, relation: str, promised: float | None) -> str:
    return _shown(measured) if promised is None else f"{_shown(measured)} ({relation} {promised:.3g})"
