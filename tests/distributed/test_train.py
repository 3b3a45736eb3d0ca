"""`tileloss train` in two processes learns what it learns in one, from the same batches."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

for package in ("transformers", "datasets", "accelerate", "matplotlib"):
    pytest.importorskip(package)
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch is built without gloo", allow_module_level=True)

train = pytest.importorskip("tileloss.train")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Pairs of texts that share some of their words with each other, and some with other pairs."""
    draw = random.Random(0)
    words = [f"word{i}" for i in range(200)]
    rows = []
    for _ in range(300):
        anchor = draw.sample(words, 6)
        rows.append({"anchor": " ".join(anchor), "positive": " ".join([*anchor[:4], *draw.sample(words, 3)])})
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def options(pairs: Path, folder: Path, batch: int) -> list[str]:
    settings = {
        "data": pairs, "output_dir": folder, "per_device_train_batch_size": batch, "dimension": 16,
        "num_train_epochs": 2, "logging_steps": 1, "eval_strategy": "no", "compare_materialised": False,
        "disable_tqdm": True,
    }  # fmt: skip
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "metrics.json").read_text())["history"]
    return [record["loss"] for record in history if "loss" in record]


def test_two_processes_learn_what_one_does(pairs: Path, tmp_path: Path) -> None:
    command = str(Path(sys.executable).with_name("tileloss"))
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
        command,
        "train",
    ]
    started = subprocess.Popen(
        [sys.executable, "-P", *launcher, *options(pairs, tmp_path / "two", 32)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    train.main(options(pairs, tmp_path / "one", 64))
    output = started.communicate()[0]
    assert started.returncode == 0, output
    assert output.count("pairs to learn from") == 1, "one process speaks for both"
    alone, together = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(alone) == 8
    assert alone[-1] < alone[0] / 2
    assert together == pytest.approx(alone, rel=1e-4)
    figures = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert figures["pairs_per_step"] == 64
