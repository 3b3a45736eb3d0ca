"""Where the time of a step goes on a GPU: the host, the device, and its kernels one by one.

For each case three times of loss and gradients: as a loop sees them, with the device's queue drained after several
calls (`wall`); until the host has started everything (`host`); and as a replayed CUDA graph, in which the host has no
part (`graph`). Where host and wall are alike, fewer launches help; where graph and wall are, faster kernels. Run as

    python -P benchmarks/gpu_steps.py --workload default gist --dtype bfloat16 --kernels 8 --theirs

With `--kernels` the kernels that take most of a step follow, measured last, because a profiler slows what comes after.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tileloss.bench.contestants import CONTESTANTS, SENTENCE_TRANSFORMERS, TILELOSS
from tileloss.bench.measure import accelerator_peak, describe
from tileloss.bench.report import signed
from tileloss.bench.workloads import DTYPES, WORKLOADS, Case

_SAMPLES, _SAMPLE_SECONDS = 5, 0.06


def step_of(name: str, case: Case) -> Callable[[], list[Tensor]]:
    """Loss and gradients of the case, by a contestant."""
    embeddings = case.embeddings()
    loss = CONTESTANTS[name].build(WORKLOADS[case.workload])

    def step() -> list[Tensor]:
        value = loss(embeddings)
        return [value.detach(), *torch.autograd.grad(value, embeddings)]

    return step


def wall(step: Callable[[], object]) -> float:
    """Seconds of a warm step, the median over samples of several calls each."""
    once = host(step, drain=True)
    calls = max(1, int(_SAMPLE_SECONDS / once))
    samples = []
    for _ in range(_SAMPLES):
        start = time.perf_counter()
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) / calls)
    return statistics.median(samples)


def host(step: Callable[[], object], drain: bool = False) -> float:
    """Seconds until one step has returned, and with `drain` until the device is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if drain:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def replayed(step: Callable[[], object]) -> float:
    """Seconds of a step as a CUDA graph."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()  # which a replay writes to
    seconds = wall(graph.replay)
    del kept
    return seconds


def kernels(step: Callable[[], object], count: int) -> list[tuple[str, int, float]]:
    """The kernels that take most of a step: name, launches and seconds."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    found = [(event.key, event.count, event.self_device_time_total / 1e6) for event in recorded.key_averages()]
    return sorted(found, key=lambda entry: -entry[2])[:count]


def measure(case: Case, theirs: bool) -> dict[str, Any]:
    """What a step of the case takes; a figure that cannot be had is a message instead."""
    step = step_of(TILELOSS, case)
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    figures: dict[str, Any] = {"first": time.perf_counter() - start}
    ways = {"peak_bytes": accelerator_peak, "wall": wall, "host": lambda step: min(host(step) for _ in range(3))}
    for name, way in (ways | {"graph": replayed}).items():
        figures[name] = _or_why_not(way, step)
    if theirs:
        stock = step_of(SENTENCE_TRANSFORMERS, case)
        figures["theirs"] = _or_why_not(lambda step: (step(), wall(step))[1], stock)
    torch.cuda.empty_cache()
    return {"case": vars(case), **figures}


def _or_why_not(way: Callable[..., Any], step: Callable[[], object]) -> Any:
    try:
        return way(step)
    except Exception as error:
        return describe(error)


def _shown(figure: Any) -> str:
    return f"{1e3 * figure:.2f} ms" if isinstance(figure, float) else str(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["default"], help="default: %(default)s")
    parser.add_argument("--batch", nargs="+", type=int, default=[32_768], help="default: 32768")
    parser.add_argument("--width", nargs="+", type=int, default=[768], help="default: 768")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="default: bfloat16")
    parser.add_argument("--theirs", action="store_true", help="time sentence-transformers too")
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help="list so many kernels of every case")
    parser.add_argument("--out", type=Path, help="file for the figures")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; benchmarks for a CPU are those of `tileloss bench`")
    sizes = product(options.workload, options.batch, options.width, options.dtype)
    cases = [Case(*size, device="cuda") for size in sizes]
    records = []
    for case in cases:
        records.append(measure(case, options.theirs))
        shown = (f"{key} {_shown(figure)}" for key, figure in records[-1].items() if key not in ("case", "peak_bytes"))
        print(f"{case}: {', '.join(shown)}, peak {records[-1]['peak_bytes']} bytes", flush=True)
    for case, record in zip(cases, records, strict=True) if options.kernels else ():
        step = step_of(TILELOSS, case)
        step()
        record["kernels"] = kernels(step, options.kernels)
        print(
            f"\n{case}",
            *(f"{_shown(t):>12} x{count:<5d} {name[:90]}" for name, count, t in record["kernels"]),
            sep="\n",
        )
    if options.out is not None:
        options.out.write_text(json.dumps(signed({"cases": records}), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
