"""The page about standing in for sentence-transformers: its examples run, in order, as a reader would paste them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tileloss

datasets = pytest.importorskip("datasets")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "drop-in.md"


def test_the_examples_run_as_written(
    tiny_encoder: Callable[..., Any],
    texts: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # where the trainer writes
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    pairs = datasets.Dataset.from_dict({"anchor": texts(4, seed=0), "positive": texts(4, seed=1)})
    namespace: dict[str, Any] = {"model": tiny_encoder(), "pairs": pairs}
    try:
        for block in blocks:
            exec(compile(block, PAGE.name, "exec"), namespace)
    finally:
        tileloss.unpatch_sentence_transformers()
    assert "MatryoshkaLoss" in capsys.readouterr().out
    assert type(namespace["loss"]) is tileloss.losses.MatryoshkaLoss
    logged = namespace["trainer"].state.log_history
    assert logged
    assert torch.isfinite(torch.tensor([entry.get("train_loss", 0.0) for entry in logged])).all()
