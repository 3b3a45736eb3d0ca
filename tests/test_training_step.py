"""The benchmark of whole training steps, at sizes that take no time."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "training_step.py"


def test_both_sides_of_every_case_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("training_step", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "training_step", script)  # where dataclasses look for their module
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "WORDS", 50)
    monkeypatch.setattr(script, "STATIC_WIDTH", 8)
    monkeypatch.setitem(script.SHAPES, "minilm", (1, 16, 2, 16))
    monkeypatch.setattr("tileloss.bench.measure.SHORTEST_COMPARISON", 0.1)
    out = tmp_path / "steps.json"
    script.main(
        ["--encoder", "static", "minilm", "--batch", "12", "--length", "3", "--mini_batch", "8", "--out", str(out)]
    )
    static, cached = json.loads(out.read_text())["cases"]
    assert static["loss"] == "MultipleNegativesRankingLoss"
    assert cached["loss"] == "CachedMultipleNegativesRankingLoss"
    for record in (static, cached):
        assert record["missing"] == {}
        for figures in (record["seconds"], record["loss_seconds"], record["peak_bytes"]):
            assert set(figures) == {"tileloss", "sentence-transformers"}
            assert all(figure > 0 for figure in figures.values())
        assert record["speedup"] == pytest.approx(
            record["seconds"]["sentence-transformers"] / record["seconds"]["tileloss"]
        )
    assert len(capsys.readouterr().out.splitlines()) == 3
    script.main(["--encoder", "minilm", "--batch", "12", "--time_limit", "0", "--out", str(out)])
    assert "time limit" in json.loads(out.read_text())["cases"][0]["missing"]["all"]
