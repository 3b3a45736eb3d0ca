"""Measure the loss over several processes: gather beside sentence-transformers', the ring's memory beside gather's.

Processes on the CPU and gloo, one thread each, so that they stand for devices that share nothing. Time is of one step,
forward and backward, of MultipleNegativesRankingLoss on given embeddings in two processes, the implementations in
turns: the least of several. Memory is the most that PyTorch allocates at one time in a step beside its inputs,
gradients included, in four processes. Run as

    python -P benchmarks/many_devices.py --out benchmarks/results/many_devices.json

It takes about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tileloss.bench.report import leave
from tileloss.losses import MultipleNegativesRankingLoss

SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
OBJECTIVES: dict[str, dict[str, Any]] = {"query_to_doc": {}, "symmetric": SYMMETRIC}


def embeddings(rows: int, width: int) -> list[Tensor]:
    torch.manual_seed(dist.get_rank())
    return [torch.randn(rows, width, requires_grad=True) for _ in range(2)]


def step(loss: nn.Module, columns: list[Tensor]) -> None:
    for column in columns:
        column.grad = None
    loss.compute_loss_from_embeddings(columns, None).backward()  # type: ignore[operator]


def seconds(run: Callable[[], None]) -> float:
    """Of the slowest process, from a common start."""
    dist.barrier()
    start = time.perf_counter()
    run()
    took = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def peak_bytes(run: Callable[[], None]) -> int:
    """The most that is allocated at one time, beside what there was before; of the process that takes most."""
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    held = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    most = torch.tensor(peak)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most.item())


def measure_time(rows: int, width: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a step by objective and implementation, and how many times faster than the oracle each is."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss as Oracle

    columns, found = embeddings(rows, width), {}
    for name, options in OBJECTIVES.items():
        contestants = {
            "sentence-transformers": Oracle(nn.Identity(), gather_across_devices=True, **options),
            "gather": MultipleNegativesRankingLoss(nn.Identity(), gather_across_devices="gather", **options),
            "ring": MultipleNegativesRankingLoss(nn.Identity(), gather_across_devices="ring", **options),
        }
        least = dict.fromkeys(contestants, float("inf"))
        for _ in range(rounds + 1):  # the first is a warm-up, and never the least
            for contestant, loss in contestants.items():
                least[contestant] = min(least[contestant], seconds(lambda loss=loss: step(loss, columns)))  # type: ignore[misc]
        theirs = least["sentence-transformers"]
        found[name] = least | {f"speedup of {way}": theirs / least[way] for way in ("gather", "ring")}
    return found


def measure_memory(rows: int, width: int) -> dict[str, dict[str, float]]:
    """Peak bytes of a step by objective and way, and the ring's share of gather's."""
    columns, found = embeddings(rows, width), {}
    for name, options in OBJECTIVES.items():
        peaks = {}
        for way in ("gather", "ring"):
            loss = MultipleNegativesRankingLoss(nn.Identity(), gather_across_devices=way, **options)
            for column in columns:
                column.grad = None  # freed while memory is counted, it would be credited to this step
            peaks[way] = peak_bytes(lambda loss=loss: step(loss, columns))  # type: ignore[misc]
        found[name] = peaks | {"ring over gather": peaks["ring"] / peaks["gather"]}
    return found


def process(rank: int, processes: int, folder: str, measure: Callable[..., Any], *arguments: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    found = measure(*arguments)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def in_processes(processes: int, measure: Callable[..., Any], *arguments: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (processes, folder, measure, *arguments), processes)
        return json.loads((Path(folder) / "found.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the figures")
    parser.add_argument("--rows", type=int, default=4096, help="rows of each process")
    parser.add_argument("--width", type=int, default=384, help="width of the embeddings")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each implementation")
    options = parser.parse_args()
    figures = {
        "rows_per_process": options.rows,
        "width": options.width,
        "seconds_in_2_processes": in_processes(2, measure_time, options.rows, options.width, options.rounds),
        "peak_bytes_in_4_processes": in_processes(4, measure_memory, options.rows, options.width),
    }
    leave(figures, options.out)


if __name__ == "__main__":
    main()
