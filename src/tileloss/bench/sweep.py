"""A run over many cases: of each, first everybody's memory, then everybody's time.

Memory goes first because it is also the safe way to find out who can run what: it happens in processes that may die.
A contestant that fails at one size, or is predicted not to fit, is left out at the larger ones of that curve, and the
reason is kept in the results. Cases are run in the order given, so that a time limit costs the last, and what has been
measured is handed on after each, so that a run that is cut short leaves that behind.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from tileloss.bench.contestants import CONTESTANTS, FLOOR, Steps, floor_steps
from tileloss.bench.measure import Memory, MemoryProcess, available_memory, describe, time_in_turns
from tileloss.bench.workloads import DTYPES, WORKLOADS, Case

# to plan by: how many steps one memory takes, how long forward takes beside forward and backward, and how much of the
# time limit may go into one contestant's memory in one case, or into the times of one case
_MEMORY_STEPS, _FORWARD_SHARE, _PART = 3, 0.5, 1 / 7


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
        seconds: for the whole run; None: no limit. What is predicted to end later, or to take more than a seventh of
            it by itself, is not started.
    """

    memory: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        self._start = time.monotonic()

    def exceeded_by(self, seconds: float) -> bool:
        """Whether work of that length, started now, would take more than its part of the time, or end beyond it."""
        if self.seconds is None:
            return False
        return seconds > _PART * self.seconds or time.monotonic() - self._start + seconds > self.seconds


Tried = list[tuple[Case, Memory]]


def sweep(
    cases: Iterable[Case],
    contestants: Sequence[str],
    rounds: int,
    limits: Limits,
    keep: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Measure every contestant in every case: memory first, then time, with the floor of each case beside it.

    Args:
        cases: what to measure; run in this order.
        contestants: keys of `CONTESTANTS`.
        rounds: how many samples of each time at least.
        limits: of memory and time.
        keep: is given, after each case, the results so far.

    Returns:
        By case and contestant what was measured, or why it was not; and so of `FLOOR`, where a loss compares all rows.
    """
    results: Results = {}
    tried: dict[tuple, Tried] = {}
    with ExitStack() as stack:
        threads = torch.get_num_threads()
        processes = [stack.enter_context(MemoryProcess(name, threads)) for name in contestants]
        for case in (progress := tqdm(list(cases), unit="case")):
            progress.set_postfix_str(str(case))
            outcomes = results[case] = {name: Outcome() for name in (*contestants, FLOOR)}
            for process in processes:
                name = process.contestant
                outcomes[name] = _memory(process, case, tried.setdefault((name, case.group), []), limits)
            _measure_time(case, outcomes, rounds, limits)
            keep(results)
    return results


def _memory(process: MemoryProcess, case: Case, tried: Tried, limits: Limits) -> Outcome:
    """One contestant's memory in one case, in its own process, noted down beside what was tried on that curve."""
    missing = _obstacle(process.contestant, case, _nearest(tried, case.batch), limits)
    memory = process.measure(case) if missing is None else Memory(missing=missing)
    tried.append((case, memory))
    return Outcome(memory=memory if memory.missing is None else None, missing=memory.missing)


def _nearest(tried: Tried, batch: int) -> tuple[Case, Memory] | None:
    """By what to predict a batch: the next smaller one that was tried, else the next larger one that ran."""
    smaller = [entry for entry in tried if entry[0].batch <= batch]
    if smaller:
        return max(smaller, key=lambda entry: entry[0].batch)
    larger = [entry for entry in tried if entry[1].missing is None]
    return min(larger, key=lambda entry: entry[0].batch, default=None)


def _obstacle(name: str, case: Case, known: tuple[Case, Memory] | None, limits: Limits) -> str | None:
    """Why not to try this case, by what another one on the curve needed; None: try it."""
    matrix = case.batch * case.docs * DTYPES[case.dtype].itemsize
    matrices = WORKLOADS[case.workload].matrices if CONTESTANTS[name].materialises else 0
    needed, seconds = matrices * matrix, 0.0
    if known is not None:
        other, memory = known
        if memory.missing is not None:
            return memory.missing
        growth = case.batch / other.batch
        needed = round(memory.peak * growth ** (2 if matrices else 1))
        seconds = _MEMORY_STEPS * memory.seconds * growth**2
    if limits.exceeded_by(seconds):
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
            outcomes[name].missing = f"left out: timing B={case.batch} would take more than its part of the time limit"
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
