"""What a run leaves behind: a table to read, JSON with every raw timing and what it was measured on, and figures."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import tileloss
from tileloss.bench.contestants import FLOOR, REFERENCE, SENTENCE_TRANSFORMERS, TILELOSS
from tileloss.bench.sweep import Outcome, Results
from tileloss.bench.workloads import WORKLOADS, Case

MIB = 2**20

# fixed, so that a contestant looks the same in every figure: colour, line style, marker
_LOOKS = {
    "tileloss": ("#0b5fa5", "-", "o"),
    "tileloss-tiled": ("#4fa3d9", "--", "s"),
    "tileloss-triton": ("#12a594", "--", "D"),
    "tileloss-reference": ("#8a8f98", "-", "v"),
    "pytorch": ("#c98500", "-", "^"),
    "torch.compile": ("#8250c4", "-", "P"),
    "sentence-transformers": ("#c8372d", "-", "X"),
    FLOOR: ("#30343b", ":", ""),
}


def machine() -> dict[str, Any]:
    """The processor, its cores and memory, and the accelerator if there is one."""
    described: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        described["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        runtime = torch.version.cuda or torch.version.hip
        described |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "gpu_runtime": runtime}
    return described


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def versions() -> dict[str, str | None]:
    """Python's version and those of the packages that matter; None for what is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "tileloss": tileloss.__version__,
        "torch": torch.__version__,  # with the build, which a package from PyPI keeps out of its own version
    }
    for package in ("triton", "sentence-transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def origin(command: str) -> dict[str, Any]:
    """What a file of results says of how, when, where and with what they came about."""
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def signed(figures: dict[str, Any]) -> dict[str, Any]:
    """What a script has measured, with its origin: the command line that it was started by."""
    return {**figures, **origin(shlex.join(["python", "-P", *sys.argv]))}


def leave(figures: dict[str, Any], out: Path | None) -> None:
    """Print what a script has measured, with its origin, and write it to a file if there is to be one."""
    text = json.dumps(signed(figures), indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n")


def baseline_of(results: Results) -> str:
    """Who the others are compared with: sentence-transformers if it ran at all, else the materialised reference."""
    ran = any(
        SENTENCE_TRANSFORMERS in outcomes and outcomes[SENTENCE_TRANSFORMERS].seconds for outcomes in results.values()
    )
    return SENTENCE_TRANSFORMERS if ran else REFERENCE


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Their quotient, or None where either is missing."""
    return numerator / denominator if numerator is not None and denominator else None


def peak(outcome: Outcome | None) -> int | None:
    """The peak bytes of an outcome that may not be there."""
    return outcome.memory.peak if outcome is not None and outcome.memory is not None else None


def table(results: Results) -> str:
    """Everything measured, one line per case and contestant, then why the rest is missing."""
    baseline = baseline_of(results)
    lines: list[str | None] = [
        f"speed and memory are compared with {baseline}; times are medians, with quartiles in brackets"
    ]
    for group, cases in _curves(results):
        workload, width, dtype, device = group
        lines += ["", f"{WORKLOADS[workload].title} ({workload}), D={width}, {dtype}, {device}"]
        lines += [
            f"{'B':>7}  {'contestant':<21} {'forward ms':>10} {'forward+backward ms':>26} {'examples/s':>11}"
            f" {'x floor':>7} {'speed':>7} {'peak MiB':>9} {'memory':>8}"
        ]
        lines += [_line(case, name, results[case], baseline) for case in cases for name in results[case]]
    return "\n".join([line for line in lines if line is not None] + _reasons(results))


def _line(case: Case, name: str, outcomes: dict[str, Outcome], baseline: str) -> str | None:
    outcome, other = outcomes[name], None if name == FLOOR else outcomes.get(baseline)
    if outcome.seconds is None and outcome.memory is None:
        return None
    forward = both = examples = "-"
    if outcome.seconds is not None:
        low, middle, high = (1e3 * seconds for seconds in _quartiles(outcome.forward_backward))
        forward, both = f"{1e3 * _quartiles(outcome.forward)[1]:.4g}", f"{middle:.4g} [{low:.4g}, {high:.4g}]"
        examples = f"{case.batch / outcome.seconds:,.0f}"
    bytes_held = peak(outcome)
    return (
        f"{case.batch:>7}  {name:<21} {forward:>10} {both:>26} {examples:>11}"
        f" {_cell(ratio(outcome.seconds, outcomes[FLOOR].seconds)):>7}"
        f" {_cell(ratio(other.seconds if other else None, outcome.seconds), 'x'):>7}"
        f" {_cell(ratio(bytes_held, MIB)):>9} {_cell(ratio(bytes_held, peak(other)), 'x'):>8}"
    )


def _quartiles(seconds: list[float]) -> list[float]:
    return statistics.quantiles(seconds, n=4, method="inclusive")


def _cell(number: float | None, unit: str = "") -> str:
    return "-" if number is None else f"{number:.3g}{unit}" if number < 100 else f"{number:.0f}{unit}"


def _reasons(results: Results) -> list[str]:
    """Each reason for a missing figure once, with the contestant and where it applies."""
    where: dict[tuple[str, str], list[Case]] = {}
    for case, outcomes in results.items():
        for name, outcome in outcomes.items():
            if outcome.missing is not None:
                where.setdefault((name, outcome.missing), []).append(case)
    lines = [
        f"  {name}: {cases[0]}{f' and {len(cases) - 1} more' if len(cases) > 1 else ''}: {reason}"
        for (name, reason), cases in where.items()
    ]
    return ["", "not measured:", *lines] if lines else []


def _curves(results: Results) -> Iterator[tuple[tuple[str, int, str, str], list[Case]]]:
    """The cases of each curve over the batch size, smallest first, in the order of the workloads."""
    curves: dict[tuple[str, int, str, str], list[Case]] = {}
    for case in results:
        curves.setdefault(case.group, []).append(case)
    order = list(WORKLOADS)
    for group in sorted(curves, key=lambda group: (order.index(group[0]), *group[1:])):
        yield group, sorted(curves[group], key=lambda case: case.batch)


def save_json(results: Results, path: Path, command: str, extra: dict[str, Any]) -> None:
    """Write everything: machine, versions, date, command, `extra`, and per case every raw timing in seconds."""
    cases = [
        asdict(case) | {"results": {name: _record(case, outcome) for name, outcome in outcomes.items()}}
        for case, outcomes in results.items()
    ]
    content = {**origin(command), **extra, "cases": cases}
    path.write_text(json.dumps(content, indent=1) + "\n")


def _record(case: Case, outcome: Outcome) -> dict[str, Any]:
    record: dict[str, Any] = {"missing": outcome.missing} if outcome.missing is not None else {}
    if outcome.memory is not None:
        memory = outcome.memory
        record |= {"peak_bytes": memory.peak, "resident_bytes": memory.resident, "step_seconds": memory.seconds}
    for kind in ("forward", "forward_backward"):
        seconds = getattr(outcome, kind)
        if seconds:
            quartiles = _quartiles(seconds)
            record[kind] = {
                "seconds": seconds,
                "quartiles": quartiles,
                "examples_per_second": case.batch / quartiles[1],
            }
    return record


def save_figures(results: Results, stem: Path) -> list[Path]:
    """Draw time and memory against the batch size, log-log: a figure per workload, a column per width and dtype.

    Returns:
        The PNG files written, `<stem>-<workload>.png`; none for a workload measured at one batch size only.

    Raises:
        ImportError: without matplotlib.
    """
    by_workload: dict[str, list[tuple[tuple[str, int, str, str], list[Case]]]] = {}
    for group, cases in _curves(results):
        if len(cases) > 1:
            by_workload.setdefault(group[0], []).append((group, cases))
    return [_figure(results, workload, curves, stem) for workload, curves in by_workload.items()]


def _figure(results: Results, workload: str, curves: list, stem: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.6 * len(curves), 7.2), 7.2), layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False, sharex="col", sharey="row")
    for column, (group, cases) in enumerate(curves):
        seconds = {name: [(case.batch, results[case][name].seconds) for case in cases] for name in results[cases[0]]}
        peaks = {name: [(case.batch, ratio(peak(results[case][name]), MIB)) for case in cases] for name in seconds}
        milliseconds = {name: [(batch, y and 1e3 * y) for batch, y in points] for name, points in seconds.items()}
        _draw(axes[0, column], milliseconds)
        _draw(axes[1, column], peaks)
        axes[0, column].set_title(f"D = {group[1]}, {group[2]}, {group[3]}", fontsize=10)
        axes[1, column].set_xlabel("batch size")
        ticks = [case.batch for case in cases]
        axes[1, column].set_xticks(ticks, [f"{batch // 1024}k" if batch >= 1024 else str(batch) for batch in ticks])
    axes[0, 0].set_ylabel("forward + backward, ms")
    axes[1, 0].set_ylabel("peak memory beyond the inputs, MiB")
    handles = {
        label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3 if len(curves) == 1 else 4, frameon=False
    )
    figure.suptitle(f"{WORKLOADS[workload].title}: {machine().get('gpu', _cpu_name())}", fontsize=11)
    path = stem.with_name(f"{stem.name}-{workload}.png")
    figure.savefig(path, dpi=140)
    return path


def _draw(axis: Any, lines: dict[str, list[tuple[int, float | None]]]) -> None:
    """One log-log line per contestant, through the points that were measured."""
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    for name, points in lines.items():
        measured = [(batch, y) for batch, y in points if y]
        if measured:
            colour, style, marker = _LOOKS.get(name, ("#7a6a53", "-.", "d"))
            height = 4 if name == TILELOSS else 3  # ours stays visible where it meets the backend it chose
            look = {"color": colour, "marker": marker, "markersize": 5, "zorder": height}
            axis.plot(*zip(*measured, strict=True), style, label=name, **look)
    axis.minorticks_off()
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
