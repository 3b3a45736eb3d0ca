"""`tileloss doctor`: what is installed, what would run where and why, and whether it computes what it should.

Problem: a slow or a wrong loss is noticed late. Method: a list of checks, each a function from a device to findings;
the last computes every function of `tileloss.functional` on the device, by each backend that can run there, and
compares values and gradients with the reference in float64. Trade-off: a hundred rows in a few seconds are no proof.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tileloss
from tileloss import backend, functional, loss_probes
from tileloss.errors import BackendError
from tileloss.guide import Guide
from tileloss.integrations.sentence_transformers import TESTED_VERSIONS

OK, NOTE, FAILED = "ok", "note", "failed"
PACKAGES = ("torch", "triton", "sentence-transformers", "transformers", "accelerate", "datasets")
SIZES = (32, 2048)  # rows for which the choice of a backend is shown, of embeddings as wide as
USUAL_WIDTH = loss_probes.WIDTH
LOSSES = tuple(loss_probes.PROBES)
_AUTOTUNE = "TILELOSS_AUTOTUNE"  # read by the kernels, which only Triton can import
ROWS, WIDTH = 100, 65  # of the self-check: neither fills a block or a tile


@dataclass(frozen=True)
class Finding:
    """One line of a check.

    Attributes:
        name: what was looked at.
        detail: what was found, for people.
        status: "ok", "note" (worth knowing, nothing is wrong) or "failed".
        facts: the same for programs.
    """

    name: str
    detail: str
    status: str = OK
    facts: dict[str, Any] = field(default_factory=dict)


class Inputs(NamedTuple):
    """What the functions are tried on."""

    queries: Tensor  # (B, D)
    docs: Tensor  # (B, D)
    labels: Tensor  # (B,) classes
    grades: Tensor  # (B,) numbers in [0, 1)


def inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The same numbers in every dtype and on every device; queries and docs require gradients."""
    generator = torch.Generator().manual_seed(0)
    queries, noise = torch.randn(2, rows, width, generator=generator)
    docs = 0.3 * queries + noise
    return Inputs(
        queries=queries.to(device, dtype).requires_grad_(),
        docs=docs.to(device, dtype).requires_grad_(),
        labels=torch.arange(rows, device=device) % max(rows // 8, 2),
        grades=torch.rand(rows, generator=generator).to(device, dtype),
    )


# every public function, in its variants: "name" or "name, variant"
PROBES: dict[str, Callable[[Inputs], Tensor]] = {
    "contrastive_loss": lambda x: functional.contrastive_loss(x.queries, x.docs),
    "contrastive_loss, both directions": lambda x: functional.contrastive_loss(
        x.queries, x.docs, directions=("query_to_doc", "doc_to_query"), partition="per_direction"
    ),
    "contrastive_loss, guided": lambda x: functional.contrastive_loss(
        x.queries, x.docs, exclude=Guide(x.docs.detach(), x.queries.detach())
    ),
    "matryoshka_contrastive_loss": lambda x: functional.matryoshka_contrastive_loss(
        x.queries, x.docs, dims=(x.queries.shape[1], 16, 3)
    ),
    "triplet_loss, all": lambda x: functional.triplet_loss(x.queries, x.labels, mining="all", margin=1.0),
    "triplet_loss, hard": lambda x: functional.triplet_loss(x.queries, x.labels, mining="hard", margin=1.0),
    "triplet_loss, semi-hard": lambda x: functional.triplet_loss(x.queries, x.labels, mining="semi_hard", margin=1.0),
    "hardest_negatives": lambda x: functional.hardest_negatives(x.queries, x.docs).similarity,
    "ranking_loss": lambda x: functional.ranking_loss((x.queries * x.docs).sum(1) / 8, x.grades),
    "dispersion": lambda x: torch.stack([*functional.dispersion(x.queries)]),
    "paired_similarity": lambda x: functional.paired_similarity(x.queries, x.docs),
    "paired_distance": lambda x: functional.paired_distance(x.queries, x.docs),
    "pair_logits": lambda x: functional.pair_logits(x.queries, x.docs, x.docs[:6].reshape(2, -1)),
    "prefix_cosines": lambda x: functional.prefix_cosines(x.queries, x.docs, (x.queries.shape[1], 16, 3)),
    "pairwise_similarity": lambda x: functional.pairwise_similarity(x.queries, x.docs),
    "pairwise_distance": lambda x: functional.pairwise_distance(x.queries, x.docs),
    "triplet_masks": lambda x: functional.triplet_masks(x.labels).anchor_positive.to(x.grades.dtype),
}


def versions(device: torch.device) -> Iterator[Finding]:
    """What is installed."""
    yield Finding("tileloss", tileloss.__version__, facts={"version": tileloss.__version__})
    yield Finding("python", platform.python_version(), facts={"version": platform.python_version()})
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, "not installed", facts={"version": None})
            continue
        if package == "sentence-transformers" and version not in TESTED_VERSIONS:
            tested = ", ".join(TESTED_VERSIONS)
            yield Finding(package, f"{version}, not tested with tileloss ({tested} are)", NOTE, {"version": version})
        else:
            yield Finding(package, version, facts={"version": version})


def devices(device: torch.device) -> Iterator[Finding]:
    """What there is to compute on."""
    yield Finding("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    for kind in ("cuda", "xpu"):
        module = torch.get_device_module(kind)
        for index in range(module.device_count() if module.is_available() else 0):
            properties = module.get_device_properties(index)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            yield Finding(f"{kind}:{index}", f"{properties.name}, {memory}", facts={"memory": properties.total_memory})
    if torch.backends.mps.is_available():
        yield Finding("mps", "Apple GPU: by the 'tiled' backend, and not part of the self-check, for want of float64")


def triton(device: torch.device) -> Iterator[Finding]:
    """Whether the kernels can run, and how their configurations are chosen."""
    obstacle = backend._triton_obstacle(device, torch.float32)
    yield Finding("kernels", f"not on {device}: {obstacle}" if obstacle else f"run on {device}")
    if importlib.util.find_spec("triton") is None:
        return
    from triton import knobs

    yield Finding("cache", f"compiled kernels and tuned configurations are kept in {knobs.cache.dir}")
    if os.environ.get(_AUTOTUNE) == "0":
        yield Finding("configurations", f"the first of each kernel's, untuned ({_AUTOTUNE}=0)", NOTE)
    else:
        yield Finding("configurations", f"tuned at a kernel's first use; {_AUTOTUNE}=0 takes the first one, at once")


def backends(device: torch.device) -> Iterator[Finding]:
    """Which backend would serve each loss and each function, and why."""
    asked = backend.requested()
    if asked != "auto":
        origin = f"the environment variable {backend.ENVIRONMENT_VARIABLE}"
        yield Finding("asked for", f"{asked!r}, by {origin}, for every call", NOTE)
    for name in LOSSES:
        yield _served(name, lambda rows, name=name: loss_probes.call(name, rows, device))  # type: ignore[misc]
    for name, why in loss_probes.ELSEWHERE.items():
        yield Finding(name, why)
    for name, probe in PROBES.items():
        yield _served(
            name,
            lambda rows, probe=probe: probe(inputs(rows, USUAL_WIDTH, torch.float32, device)),  # type: ignore[misc]
        )


def _served(name: str, call: Callable[[int], object]) -> Finding:
    """What calls of two sizes choose, each the backends in the order of their use."""
    choices: dict[int, list[backend.Choice]] = {}
    for rows in SIZES:
        try:
            with backend.recorded() as choices[rows], torch.no_grad(), _untuned():
                call(rows)
        except ImportError as error:
            return Finding(name, f"not to be had here: {error}", NOTE)
        except Exception as error:
            return _raised(name, error)
    if not choices[SIZES[0]]:
        return Finding(name, "reference (it has one form alone)")
    used = {rows: " and ".join(dict.fromkeys(choice.backend for choice in made)) for rows, made in choices.items()}
    shown = ", ".join(f"{rows:,} rows: {names}" for rows, names in used.items())
    facts = {str(rows): [choice._asdict() for choice in made] for rows, made in choices.items()}
    return Finding(name, f"{shown} ({choices[SIZES[-1]][0].reason})", facts=facts)


def self_check(device: torch.device) -> Iterator[Finding]:
    """Whether values and gradients are those of the reference in float64, by each backend that can run here."""
    for name, probe in PROBES.items():
        try:
            exact, _ = _value_and_gradients(probe, "reference", torch.float64, device)
            eager, _ = _value_and_gradients(probe, "reference", torch.float32, device)
            for kind in ("tiled", "triton"):
                try:
                    found, served_by = _value_and_gradients(probe, kind, torch.float32, device)
                except BackendError:
                    continue  # it has no such form, or not on this device
                if served_by == kind:
                    yield _judged(f"{name} ({kind})", *(_errors(x, exact) for x in (found, eager)))
        except Exception as error:
            yield _raised(name, error)


def _value_and_gradients(
    probe: Callable[[Inputs], Tensor], kind: str, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], str | None]:
    """A function's value, its gradients for queries and docs, and the backend that served it, if it has several."""
    given = inputs(ROWS, WIDTH, dtype, device)
    with backend.recorded() as made, backend.use_backend(kind), _untuned():
        value = probe(given)
        if value.requires_grad:
            # weighted unevenly, so that no part of a gradient cancels
            weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=device).view(value.shape)
            (value * weights).sum().backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (given.queries, given.docs)]
    return [value.detach(), *gradients], made[0].backend if made else None


@contextmanager
def _untuned() -> Iterator[None]:
    """Kernels that are loaded in the block take their first configuration: the same numbers, and no tuning."""
    if _AUTOTUNE in os.environ:
        yield
        return
    os.environ[_AUTOTUNE] = "0"
    try:
        yield
    finally:
        del os.environ[_AUTOTUNE]


def _judged(name: str, errors: Sequence[float], of_the_plain_form: Sequence[float]) -> Finding:
    """Three times the error of the plain formula in the same dtype is allowed, if that is none to speak of itself."""
    floors = (1e-5, 1e-4, 1e-4)  # for values near zero
    limits = [min(3 * error + floor, 1e-2) for error, floor in zip(of_the_plain_form, floors, strict=True)]
    good = all(error <= limit for error, limit in zip(errors, limits, strict=True))
    value, *gradients = errors
    return Finding(
        name,
        f"error of the value {value:.0e}, of the gradients {max(gradients):.0e}",
        OK if good else FAILED,
        {"value": value, "gradients": gradients, "limits": limits},
    )


def _raised(name: str, error: Exception) -> Finding:
    return Finding(name, f"{type(error).__name__}: {error}", FAILED)


def _errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Relative norms of the differences; a difference from zero counts as it is."""
    errors = []
    for a, b in zip(found, exact, strict=True):
        size = b.norm().item()
        error = (a.to(b.dtype) - b).norm().item() / (size or 1.0)
        errors.append(error if error == error else float("inf"))  # not a number is infinitely wrong
    return errors


# what is looked at, in this order; a new check is a function here
CHECKS: dict[str, Callable[[torch.device], Iterator[Finding]]] = {
    "versions": versions,
    "devices": devices,
    "triton": triton,
    "backends": backends,
    "self-check": self_check,
}


def examine(device: torch.device) -> dict[str, list[Finding]]:
    """The findings of every check. A check that raises has failed, and the others go on."""
    report: dict[str, list[Finding]] = {}
    for title, check in CHECKS.items():
        findings = report[title] = []
        try:
            findings.extend(check(device))
        except Exception as error:
            findings.append(_raised(title, error))
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tileloss doctor`, and return 1 if a check failed.

    Args:
        argv: the arguments of the command; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="tileloss doctor", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default=_best_device(), help="what to check (%(default)s)")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(argv)
    report = examine(options.device)
    failed = [finding.name for findings in report.values() for finding in findings if finding.status == FAILED]
    if options.json:
        checks = {title: [asdict(finding) for finding in findings] for title, findings in report.items()}
        print(json.dumps({"ok": not failed, "device": str(options.device), "checks": checks}, indent=2))
    else:
        _print(report)
        print(f"\n{len(failed)} failed: {'; '.join(failed)}" if failed else "\nall is well")
    return 1 if failed else 0


def _print(report: dict[str, list[Finding]]) -> None:
    width = max(len(finding.name) for findings in report.values() for finding in findings)
    for title, findings in report.items():
        print(f"\n{title}")
        for finding in findings:
            mark = {OK: " ", NOTE: "!", FAILED: "X"}[finding.status]
            print(f"{mark} {finding.name:<{width}}  {finding.detail}")


def _best_device() -> torch.device:
    """A GPU that can also compute the reference in float64, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None and accelerator.type != "mps" else torch.device("cpu")
