"""A run over many cases: first everybody's memory, then everybody's time.

Memory goes first because it is also the safe way to find out who can run what: it happens in processes that may die.
A contestant that fails at one size, or is predicted not to fit, is left out at the larger ones of that curve, and the
reason is kept in the results. Time goes from the cheapest case to the dearest, so that a time limit costs the largest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from tileloss.bench.contestants import CONTESTANTS, FLOOR, Steps, floor_steps
from tileloss.bench.measure import Memory, MemoryProcess, available_memory, describe, time_in_turns
from tileloss.bench.workloads import DTYPES, WORKLOADS, Case

# to plan by: how many steps one memory takes, how long forward takes beside forward and backward, and how much of the
# time limit may go into measuring memory
_MEMORY_STEPS, _FORWARD_SHARE, _MEMORY_SHARE = 3, 0.5, 0.6


@dataclass
class Outcome:
    """What became of one contestant in one case.

    Attributes:
        memory: its memory, None for the floor and where it was not measured.
        forward: seconds per call of the loss alone, one number per round.
        forward_backward: seconds per call of the loss and all gradients, one number per round.
        missing: why figures are missing; None if none are.
    """

    memory: Memory | None = None
    forward: list[float] = field(default_factory=list)
    forward_backward: list[float] = field(default_factory=list)
    missing: str | None = None

    @property
    def seconds(self) -> float | None:
        """The median of forward and backward."""
        return statistics.median(self.forward_backward) if self.forward_backward else None


Results = dict[Case, dict[str, Outcome]]


@dataclass
class Limits:
    """What a run may use.

    Attributes:
        memory: bytes that a contestant's step may be predicted to need; None: what the device has free at the time.
        seconds: for the whole run; None: no limit. What is predicted to end later is not started.
    """

    memory: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        self._start = time.monotonic()

    def exceeded_by(self, seconds: float, share: float = 1.0) -> bool:
        """Whether work of that length, started now, would end beyond that share of the time."""
        return self.seconds is not None and time.monotonic() - self._start + seconds > share * self.seconds


def sweep(cases: Iterable[Case], contestants: Sequence[str], rounds: int, limits: Limits) -> Results:
    """Measure every contestant in every case: memory first, then time, with the floor of each case beside it.

    Args:
        cases: what to measure; run in order of their cost.
        contestants: keys of `CONTESTANTS`.
        rounds: how many samples of each time at least.
        limits: of memory and time.

    Returns:
        By case and contestant what was measured, or why it was not; and so of `FLOOR`, where a loss compares all rows.
    """
    results: Results = {
        case: {name: Outcome() for name in (*contestants, FLOOR)} for case in sorted(cases, key=lambda case: case.cost)
    }
    # those first whose memory ends them early: what they do not use of their part of the time, the others may
    order = sorted(contestants, key=lambda name: not CONTESTANTS[name].materialises)
    with tqdm(total=len(results) * len(order), desc="memory", unit="step") as progress:
        for position, name in enumerate(order, start=1):
            _measure_memory(name, results, limits, _MEMORY_SHARE * position / len(order), progress)
    for case in tqdm(results, desc="time", unit="case"):
        _measure_time(case, results[case], rounds, limits)
    return results


def _measure_memory(name: str, results: Results, limits: Limits, share: float, progress: tqdm) -> None:
    """One contestant's memory in all cases, in a process of its own, before that share of the time limit is over."""
    reached: dict[tuple, tuple[Case, Memory]] = {}  # by curve: the largest case that was tried
    with MemoryProcess(name, torch.get_num_threads()) as process:
        for case, outcomes in results.items():
            progress.set_postfix_str(f"{name}, {case}", refresh=False)
            outcome, before = outcomes[name], reached.get(case.group)
            outcome.missing = _obstacle(name, case, before, limits, share)
            if outcome.missing is None:
                outcome.memory = process.measure(case)
                outcome.missing = outcome.memory.missing
            if outcome.missing is not None:
                outcome.memory = None
            reached[case.group] = case, outcome.memory or Memory(missing=outcome.missing)
            progress.update()


def _obstacle(name: str, case: Case, before: tuple[Case, Memory] | None, limits: Limits, share: float) -> str | None:
    """Why not to try this case, by what the next smaller one on the curve needed; None: try it."""
    matrix = case.batch * case.docs * DTYPES[case.dtype].itemsize
    matrices = WORKLOADS[case.workload].matrices if CONTESTANTS[name].materialises else 0
    needed = matrices * matrix
    if before is not None:
        smaller, memory = before
        if memory.missing is not None:
            return memory.missing
        growth = case.batch / smaller.batch
        needed = round(memory.peak * growth ** (2 if matrices else 1))
        if limits.exceeded_by(_MEMORY_STEPS * memory.seconds * growth**2, share):
            return f"left out: measuring memory at B={case.batch} would take more than its part of the time limit"
    available = limits.memory if limits.memory is not None else available_memory(case.device)
    if available is not None and needed > available:
        return f"left out: B={case.batch} would need about {needed / 2**30:.1f} GiB of {available / 2**30:.1f} GiB"
    return None


def _measure_time(case: Case, outcomes: dict[str, Outcome], rounds: int, limits: Limits) -> None:
    """Everybody's time in one case, in turns with the floor; who has no memory figure is left out."""
    runners = {name: outcome.memory for name, outcome in outcomes.items() if outcome.memory is not None}
    if not runners:
        outcomes[FLOOR].missing = "left out: there is nobody to compare with it"
        return
    steps = [memory.seconds for memory in runners.values()]
    planned = (sum(steps) + min(steps)) * (1 + _FORWARD_SHARE) * (rounds + 1)
    if limits.exceeded_by(planned):
        for name in (*runners, FLOOR):
            outcomes[name].missing = f"left out: timing B={case.batch} would run past the time limit"
        return
    embeddings = case.embeddings()
    entries = {}
    for name in (*runners, *([FLOOR] if WORKLOADS[case.workload].matrices else [])):
        try:
            for kind, step in _warm_steps(name, case, embeddings)._asdict().items():
                entries[name, kind] = step
        except Exception as error:  # who cannot run beside the others is left out, and the others go on
            outcomes[name].missing = describe(error)
    for (name, kind), samples in time_in_turns(entries, rounds).items():
        setattr(outcomes[name], kind, samples)
    if case.device != "cpu":
        entries.clear()
        torch.accelerator.empty_cache()


def _warm_steps(name: str, case: Case, embeddings: list[torch.Tensor]) -> Steps:
    """The steps of a contestant or of the floor, each run once."""
    if name == FLOOR:
        steps = floor_steps(case, embeddings)
    else:
        steps = CONTESTANTS[name].steps(WORKLOADS[case.workload], embeddings)
    for step in steps:
        step()
    return steps
