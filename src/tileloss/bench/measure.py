"""How time and memory are measured.

Time: in one process, everything in turns, so that a machine that slows down slows all alike; medians and quartiles
over the turns, with the device's queue drained before each reading of the clock. A sample of a short step is many
calls.

Memory: one contestant to a process, so that nobody's caches count for another. The figure is the highest number of
bytes that torch's allocator held during one forward and backward beyond what it held before (the inputs), gradients
included: exact, by the profiler's record of every allocation on a CPU and by the caching allocator's own counter on
an accelerator. On Linux the process's resident high-water mark goes with it as a check: it also sees what libraries
allocate for themselves, and is coarse.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import time
import timeit
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from torch._C._profiler import _EventType
from torch.autograd.profiler import profile
from torch.utils.benchmark import timer as drained_clock

from tileloss.bench.contestants import CONTESTANTS
from tileloss.bench.workloads import WORKLOADS, Case

Step = Callable[[], None]
Name = TypeVar("Name", bound=Hashable)
_Figure = TypeVar("_Figure")

SHORTEST_SAMPLE, SHORTEST_COMPARISON = 0.05, 3.0  # seconds


class Memory(NamedTuple):
    """One contestant's memory in one case, or why there is none.

    Attributes:
        peak: bytes that torch's allocator held at most during forward and backward, beyond the inputs.
        resident: bytes by which the process's resident high-water mark rose; None where the system does not tell.
        seconds: how long one warm forward and backward took there: a single reading, to plan by.
        missing: why there is no figure; None if there is.
    """

    peak: int = 0
    resident: int | None = None
    seconds: float = 0.0
    missing: str | None = None


def describe(error: BaseException) -> str:
    """An exception's type and first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def time_in_turns(steps: Mapping[Name, Step], rounds: int) -> dict[Name, list[float]]:
    """Seconds per call of each step, at least `rounds` samples each, taken in turns; more while that is quick.

    The steps must be warm: whatever happens once (compilation, tuning) has happened. The order shifts by one each
    turn, so that nobody always goes first.
    """
    end = time.monotonic() + SHORTEST_COMPARISON
    timers = {name: timeit.Timer(step, timer=drained_clock) for name, step in steps.items()}
    single = {name: timer.timeit(1) for name, timer in timers.items()}
    calls = {name: max(1, math.ceil(SHORTEST_SAMPLE / seconds)) for name, seconds in single.items()}
    samples = {name: [seconds] if calls[name] == 1 else [] for name, seconds in single.items()}
    names = list(steps)
    while (early := time.monotonic() < end) or any(len(taken) < rounds for taken in samples.values()):
        for name in names:
            if early or len(samples[name]) < rounds:
                samples[name].append(timers[name].timeit(calls[name]) / calls[name])
        names.append(names.pop(0))
    return samples


def available_memory(device: str) -> int | None:
    """Free bytes on the device (for "cpu": in the machine), or None where the system does not tell."""
    if device != "cpu":
        return torch.accelerator.get_memory_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def cpu_peak(step: Step) -> int:
    """The most bytes that torch's CPU allocator held during `step` beyond what it held before."""
    with profile(profile_memory=True) as recorded:
        step()
    assert recorded.kineto_results is not None
    held = peak = 0
    own: set[int] = set()
    events = _allocations(recorded.kineto_results.experimental_event_tree())
    for event in sorted(events, key=lambda event: event.start_time_ns):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            own.add(address)
        elif address in own:
            own.remove(address)
        else:  # from before, at an address where an earlier profile saw an allocation and nobody the end of it
            continue
        held += size
        peak = max(peak, held)
    return peak


def _allocations(events: Iterable[Any]) -> Iterator[Any]:
    """What a profile recorded of the CPU's allocator, at any depth of its tree: allocations, and frees below zero."""
    for event in events:
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            yield event
        yield from _allocations(event.children)


def accelerator_peak(step: Step) -> int:
    """The most bytes that the accelerator's allocator held during `step` beyond what it held before."""
    torch.accelerator.synchronize()
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    step()
    torch.accelerator.synchronize()
    return torch.accelerator.max_memory_allocated() - before


def resident_peak(step: Step) -> int | None:
    """By how many bytes the resident set rose at most during `step`; None (but run) where the system does not tell."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory kept from earlier steps would hide what this one needs
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        step()
        return None
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def memory_of(case: Case, contestant: str, threads: int) -> Memory:
    """One contestant's memory in one case, measured in this process. Never raises: what goes wrong is in `missing`."""
    torch.set_num_threads(threads)
    try:
        embeddings = case.embeddings()
        step = CONTESTANTS[contestant].steps(WORKLOADS[case.workload], embeddings).forward_backward

        def fresh(measure: Callable[[Step], _Figure]) -> _Figure:
            for leaf in embeddings:
                leaf.grad = None
            return measure(step)

        step()
        peak = fresh(cpu_peak) if case.device == "cpu" else fresh(accelerator_peak)
        start = drained_clock()
        resident = fresh(resident_peak) if case.device == "cpu" else fresh(lambda step: step())
        return Memory(peak, resident, drained_clock() - start)
    except Exception as error:  # a contestant that cannot run is a result, and the others go on
        return Memory(missing=describe(error))
    finally:
        if case.device != "cpu":
            torch.accelerator.empty_cache()


class MemoryProcess:
    """A process of its own for one contestant's memory; if the system kills it, that is an answer too."""

    def __init__(self, contestant: str, threads: int) -> None:
        self.contestant, self.threads = contestant, threads
        # the profiler's own notes would run through the progress bar
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))

    def measure(self, case: Case) -> Memory:
        """The contestant's memory in the case, measured there."""
        try:
            return self._pool.submit(memory_of, case, self.contestant, self.threads).result()
        except BrokenProcessPool:
            self._pool.shutdown()
            self._pool = self._start()
            return Memory(missing="the process was killed, most likely for want of memory")

    def __enter__(self) -> MemoryProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
