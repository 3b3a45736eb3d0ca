"""`tileloss doctor`: it looks at everything, says what is wrong, and is not fooled by a function gone wrong."""

import inspect
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tileloss
from tileloss import backend, cli, doctor, functional, loss_probes, losses

CPU = torch.device("cpu")


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Leaves these losses and functions to be tried, in these checks."""

    def leave(*names: str, checks: tuple[str, ...] = ("self-check",)) -> None:
        monkeypatch.setattr(doctor, "PROBES", {name: doctor.PROBES[name] for name in names if name in doctor.PROBES})
        monkeypatch.setattr(doctor, "LOSSES", [name for name in names if name in doctor.LOSSES])
        monkeypatch.setattr(doctor, "CHECKS", {title: doctor.CHECKS[title] for title in checks})

    return leave


def test_every_public_function_is_tried() -> None:
    functions = {name for name in functional.__all__ if inspect.isfunction(getattr(functional, name))}
    tried = {name.partition(",")[0] for name in doctor.PROBES}
    assert tried == {name for name in functions if not name.endswith("_with_stats")}


def test_every_loss_is_tried_or_its_absence_explained() -> None:
    names = {name for name in losses.__all__ if issubclass(getattr(losses, name), nn.Module)}
    assert {*doctor.LOSSES, *loss_probes.ELSEWHERE} == names
    assert not {*doctor.LOSSES} & {*loss_probes.ELSEWHERE}


def test_all_is_well_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("all is well\n")
    words = " ".join(out.split())
    assert f"tileloss {tileloss.__version__}" in words
    assert f"torch {torch.__version__.partition('+')[0]}" in words
    assert "2,048 rows: tiled" in out


def test_the_report_for_programs(only: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    only("triplet_loss, hard", checks=("versions", "devices", "triton", "backends", "self-check"))
    assert cli.main(["doctor", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["device"] == "cpu"
    (checked,) = report["checks"]["self-check"]
    assert checked["name"] == "triplet_loss, hard (tiled)"
    assert 0 <= checked["facts"]["value"] <= checked["facts"]["limits"][0]
    served = {finding["name"]: finding["facts"] for finding in report["checks"]["backends"]}
    assert served["triplet_loss, hard"]["32"][0]["backend"] == "reference"
    assert served["triplet_loss, hard"]["2048"][0]["backend"] == "tiled"


@pytest.mark.parametrize(
    "broken",
    [
        lambda value: value * 1.001,
        lambda value: value.detach() + 0 * value,  # a right value without its gradient
        lambda value: value * math.nan,
    ],
)
def test_a_function_that_computes_something_else_fails(
    broken: Callable[[Any], Any],
    only: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    only("hardest_negatives", "paired_distance")
    right = functional.paired_distance

    def wrong(*args: Any, **kwargs: Any) -> Any:
        value = right(*args, **kwargs)
        return value if backend.requested() == "reference" else broken(value)

    monkeypatch.setattr(functional, "paired_distance", wrong)
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    assert capsys.readouterr().out.endswith("1 failed: paired_distance (tiled)\n")


def test_it_says_what_a_loss_would_run(only: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    """By calling it, so that whatever bends the choice shows: here a backend that is asked for."""
    only("TripletLoss", "MSELoss", checks=("backends",))
    with tileloss.use_backend("tiled"):
        report = doctor.examine(CPU)
    served = {finding.name: finding for finding in report["backends"]}
    for name in ("TripletLoss", "MSELoss"):
        assert {choice["backend"] for choice in served[name].facts["32"]} == {"tiled"}
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "TripletLoss 32 rows: reference, 2,048 rows: tiled (it is the fastest on cpu)" in words
    assert "AdaptiveLayerLoss that of the loss inside" in words


def test_a_loss_that_lacks_a_package_is_no_failure(
    only: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only("GISTEmbedLoss", checks=("backends",))
    for name in ("transformers", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "GISTEmbedLoss" in line)
    assert line.startswith("!")
    assert "tokenizers" in line


def test_a_function_that_raises_fails_alone(
    only: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only("hardest_negatives", "paired_distance", checks=("backends", "self-check"))

    def wrong(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of order")

    monkeypatch.setattr(functional, "paired_distance", wrong)
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert out.count("RuntimeError: out of order") == 2
    assert "hardest_negatives (tiled)" in out


def test_a_check_that_raises_fails_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> Any:
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "CHECKS", {"broken": broken, "versions": doctor.versions})
    report = doctor.examine(CPU)
    assert [finding.status for finding in report["broken"]] == [doctor.FAILED]
    assert report["versions"]


def test_settings_that_bend_the_choice_are_shown(
    only: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only("paired_distance", checks=("triton", "backends"))
    monkeypatch.setenv("TILELOSS_AUTOTUNE", "0")
    monkeypatch.setattr(backend, "_environment", "reference")
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "'reference', by the environment variable TILELOSS_BACKEND" in out
    assert "it was asked for by name" in out
    monkeypatch.setattr(backend, "_environment", "triton")
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    assert "was asked for and cannot run" in capsys.readouterr().out


def test_versions_that_were_not_tested_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "99.0")
    found = {finding.name: finding for finding in doctor.versions(CPU)}
    assert found["sentence-transformers"].status == doctor.NOTE
    assert "6.2.0" in found["sentence-transformers"].detail

    def missing(name: str) -> str:
        raise doctor.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(doctor.importlib.metadata, "version", missing)
    assert {finding.detail for finding in doctor.versions(CPU)} >= {"not installed"}


def test_choices_are_recorded_by_each_block_for_itself() -> None:
    x = torch.randn(4, 3)
    with backend.recorded() as outer:
        functional.hardest_negatives(x, x)
        with backend.recorded() as inner:
            functional.hardest_negatives(x, x, backend="tiled")
    functional.hardest_negatives(x, x)
    assert [choice.backend for choice in outer] == ["reference", "tiled"]
    assert [choice.backend for choice in inner] == ["tiled"]


def test_the_setting_for_kernels_is_as_it_was_afterwards(
    only: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The doctor does not wait for kernels to be tuned; whoever set the variable keeps it."""
    only("paired_distance")
    for setting in (None, "1"):
        if setting is None:
            monkeypatch.delenv("TILELOSS_AUTOTUNE", raising=False)
        else:
            monkeypatch.setenv("TILELOSS_AUTOTUNE", setting)
        doctor.examine(CPU)
        assert doctor.os.environ.get("TILELOSS_AUTOTUNE") == setting
