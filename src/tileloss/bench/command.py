"""The command `tileloss bench`: which cases, by options or by preset, and what is printed and written."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tileloss.bench.contestants import CONTESTANTS, INF_CL, LIGER, SENTENCE_TRANSFORMERS, TILELOSS
from tileloss.bench.report import save_figures, save_json, table
from tileloss.bench.sweep import Limits, Results, sweep
from tileloss.bench.targets import GPU_TARGETS, TARGETS, Target, judge, verdict_table
from tileloss.bench.workloads import DTYPES, WORKLOADS, Case

# time on a GPU is short: who runs there in the sweep, of which work, and in which widths
_ON_A_GPU = [TILELOSS, SENTENCE_TRANSFORMERS, "pytorch", "torch.compile", INF_CL, LIGER]
_WORK_ON_A_GPU = (
    "default", "symmetric", "four_directions", "hardness", "hard_negatives", "gist", "matryoshka",
    "batch_all", "batch_hard", "semi_hard",
)  # fmt: skip
_WIDTHS_ON_A_GPU = (768, 384, 1024, 4096)


@dataclass(frozen=True)
class Plan:
    """What a run measures, in this order, under a name for its files, and what it is judged by."""

    name: str
    cases: list[Case]
    contestants: list[str]
    rounds: int = 5
    minutes: float | None = None
    targets: Sequence[Target] = ()


def _doubling(first: int, last: int) -> list[int]:
    return [first << step for step in range((last // first).bit_length())]


def _accelerator() -> str | None:
    """The type of the GPU at hand, if it is one whose memory torch can measure."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None and accelerator.type in ("cuda", "xpu") else None


def _cheap_first(cases: Iterable[Case]) -> list[Case]:
    return sorted(dict.fromkeys(cases), key=lambda case: case.cost)


def _targets_plan() -> Plan:
    cases = _cheap_first(target.case for target in TARGETS)
    return Plan("targets", cases, [TILELOSS, SENTENCE_TRANSFORMERS], targets=TARGETS)


def _promised_here() -> list[Target]:
    """The targets of a GPU, on the kind of device that is here."""
    return [replace(target, device=_accelerator() or target.device) for target in GPU_TARGETS]


def _gpu_targets_plan() -> Plan:
    promised = _promised_here()
    cases = [target.case for target in promised]
    return Plan("gpu-targets", cases, [TILELOSS, SENTENCE_TRANSFORMERS], 3, 4.2, promised)


def _gpu_plan() -> Plan:
    """The most telling cases first: every loss at one size, one loss over all sizes, small batches, then the rest."""
    promised = _promised_here()
    device = promised[0].device
    at_32k = [Case(work, 32_768, 768, dtype, device) for dtype in ("bfloat16", "float32") for work in _WORK_ON_A_GPU]
    over_sizes = [Case("default", batch, 768, "bfloat16", device) for batch in _doubling(512, 131_072)]
    grid = product(_WORK_ON_A_GPU, _doubling(512, 1_048_576), _WIDTHS_ON_A_GPU, ("bfloat16", "float32"))
    rest = _cheap_first(Case(*size, device) for size in grid)
    ordered = (
        *at_32k[: len(_WORK_ON_A_GPU) + 1],
        *over_sizes,
        *(target.case for target in promised),
        *at_32k,
        *rest,
    )
    return Plan("gpu", list(dict.fromkeys(ordered)), _ON_A_GPU, 3, 4.2, promised)


PRESETS = {"targets": _targets_plan, "gpu-targets": _gpu_targets_plan, "gpu": _gpu_plan}


def _plan_of(options: argparse.Namespace) -> Plan:
    device = options.device or _accelerator() or "cpu"
    sizes = product(
        options.workload or ["default"],
        options.batch or _doubling(512, 32_768 if device == "cpu" else 262_144),
        options.width or [384, 768, 1024],
        options.dtype or (["float32"] if device == "cpu" else ["float32", "bfloat16"]),
    )
    cases = _cheap_first(Case(*size, device) for size in sizes)
    return Plan("sweep", cases, options.contestant or list(CONTESTANTS), minutes=30.0)


def _number(kind: Callable[[str], Any], least: float) -> Callable[[str], Any]:
    """A number of that kind, `least` or more, for argparse."""

    def parse(text: str) -> Any:
        number = kind(text)
        if not number >= least:
            raise argparse.ArgumentTypeError(f"must be {least:g} or more, got {text}")
        return number

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tileloss bench",
        description="Measure time and peak memory of the losses over a sweep of sizes, everybody in one run: "
        "tileloss by backend, plain PyTorch, torch.compile of it, sentence-transformers if installed, and the floor.",
    )
    parser.add_argument("--preset", choices=PRESETS, help="a fixed set of cases instead of the options below")
    parser.add_argument("--check", action="store_true", help="with a preset: exit with 1 if a target is missed")
    sizes = parser.add_argument_group("what to measure")
    sizes.add_argument("--workload", nargs="+", choices=WORKLOADS, help="default: the workload named default")
    sizes.add_argument("--batch", nargs="+", type=_number(int, 1), help="default: doubling from 512 to what fits")
    sizes.add_argument("--width", nargs="+", type=_number(int, 1), help="numbers per embedding; default: 384 768 1024")
    sizes.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: float32, on a GPU bfloat16 too")
    sizes.add_argument("--contestant", nargs="+", choices=CONTESTANTS, help="default: all")
    sizes.add_argument("--device", choices=("cpu", "cuda", "xpu"), help="default: the GPU if there is one")
    parser.add_argument(
        "--rounds", type=_number(int, 3), help="least samples of each time; default: 5, on a GPU's presets 3"
    )
    parser.add_argument("--memory-limit", type=_number(float, 0), metavar="GIB", help="default: what is free")
    parser.add_argument(
        "--time-limit", type=_number(float, 0), metavar="MINUTES", help="default: 30, GPU's presets 4.2"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder of the results; default: %(default)s"
    )
    return parser


def _chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Plan:
    """The plan that the options ask for; leaves with a message if they contradict each other or the machine."""
    if options.check and not options.preset:
        parser.error("--check judges the targets: give it together with --preset targets or a GPU's")
    if options.preset:
        given = [
            name for name in ("workload", "batch", "width", "dtype", "contestant", "device") if vars(options)[name]
        ]
        if given:
            parser.error(f"--preset {options.preset} fixes its cases: leave out --{given[0]}, or leave out --preset")
    plan = PRESETS[options.preset]() if options.preset else _plan_of(options)
    device = plan.cases[0].device
    if device not in ("cpu", _accelerator()):
        parser.error(f"torch finds no {device} device here: run with --device cpu, or the preset targets")
    if options.preset == "targets" and importlib.util.find_spec("sentence_transformers") is None:
        parser.error("the targets compare with sentence-transformers: pip install sentence-transformers==6.2.0")
    return replace(plan, rounds=options.rounds or plan.rounds, minutes=options.time_limit or plan.minutes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tileloss bench`: measure, print a table, write JSON and PNG files.

    Args:
        argv: the arguments after `tileloss bench`; None: those of this process.

    Returns:
        The exit code: 1 if `--check` was given and a target is missed, else 0.

    Raises:
        SystemExit: with code 2 and a message, for options that make no sense together or on this machine.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    options = parser.parse_args(argv)
    plan = _chosen(parser, options)
    options.out.mkdir(parents=True, exist_ok=True)
    limits = Limits(
        memory=None if options.memory_limit is None else round(options.memory_limit * 2**30),
        seconds=None if plan.minutes is None else 60 * plan.minutes,
    )
    stem = options.out / f"{plan.name}-{plan.cases[0].device}-{date.today().isoformat()}"
    command = shlex.join(["tileloss", "bench", *argv])

    def keep(results: Results) -> None:
        records = [verdict.record() for verdict in judge(results, plan.targets)]
        save_json(results, stem.with_suffix(".json"), command, {"targets": records})

    results = sweep(plan.cases, plan.contestants, plan.rounds, limits, keep)
    print(table(results))
    verdicts = judge(results, plan.targets)
    print(f"\nwritten: {', '.join(map(str, [stem.with_suffix('.json'), *_figures(results, stem)]))}")
    if verdicts:
        print(f"\n{verdict_table(verdicts)}")
        print("times depend on the machine and on what else it does: a miss on a busy machine is worth a second run")
    return int(options.check and not all(verdict.reached for verdict in verdicts))


def _figures(results: Results, stem: Path) -> list[Path]:
    try:
        return save_figures(results, stem)
    except ImportError:
        print("\nno figures: matplotlib is not installed; pip install 'tileloss[bench]' brings it")
        return []
