"""sentence-transformers' trainer and Lightning in two processes on gloo, our losses under data parallelism."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch is built without gloo", allow_module_level=True)

SCRIPT = Path(__file__).with_name("in_processes.py")
LIGHTNING_SCRIPT = Path(__file__).with_name("lightning_in_processes.py")
BIN = Path(sys.executable).parent
TORCHRUN = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2"]
# without a GPU it would start one process, were it not for --multi_gpu; port 0 is any that is free
ACCELERATE = [BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]

JOINS = """
from accelerate import PartialState
state = PartialState(cpu=True)  # what use_cpu=True in training arguments comes to
print(f"{state.process_index} of {state.num_processes} by {state.backend}", flush=True)
"""


def launch(command: list[Any], output: Path) -> str:
    """Everything that the processes print."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TILELOSS_BACKEND": "tiled"}
    with output.open("w") as file:
        run = subprocess.run([*map(str, command)], env=environment, stdout=file, stderr=file, timeout=240, check=False)
    assert run.returncode == 0, output.read_text()
    return output.read_text()


def test_losses_are_those_of_the_stock_classes_and_weights_stay_together(
    small_minilm: Path, data: dict[str, Callable[[], Any]], tmp_path: Path
) -> None:
    shutil.copytree(small_minilm, tmp_path / "model")
    sets = data["all"]()
    sets["rated"] = data["rated"]()
    sets.save_to_disk(str(tmp_path / "data"))
    launch([*TORCHRUN, SCRIPT, tmp_path], tmp_path / "output")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["ours"]["processes"] == 2
    assert len(first["ours"]["losses"]) == 4
    assert first["ours"]["losses"] == pytest.approx(first["stock"]["losses"], rel=1e-4)
    # the trainer finds the model of a mined loss, which holds it by another name, and so averages its gradients; and
    # what losses own, which it does not wrap in DistributedDataParallel, is averaged beside it
    for name in ("ours", "mined", "owning", "of ours"):
        assert first[name]["weights"] == second[name]["weights"]


def test_accelerate_starts_two_processes_without_a_gpu(tmp_path: Path) -> None:
    script = tmp_path / "joins.py"
    script.write_text(JOINS)
    printed = launch([*ACCELERATE, script], tmp_path / "output")
    for process in range(2):
        assert f"{process} of 2 by gloo" in printed


def test_lightning_gives_every_process_the_gradients_of_the_joint_batch(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    launch([sys.executable, "-P", LIGHTNING_SCRIPT, tmp_path], tmp_path / "output")
    (processes, *of_first), (_, *of_second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert processes == 2
    assert "Wrap the model and not the loss" in of_first[2], "a cached loss, whose gradients would be wrong"
    for name, (value, *gradients) in of_first[1].items():
        first, second = of_first[0][name], of_second[0][name]
        torch.testing.assert_close((first[0] + second[0]) / 2, value, rtol=1e-12, atol=0.0)
        assert len(gradients) == 3
        for found in (first, second):
            torch.testing.assert_close(found[1:], gradients, rtol=1e-10, atol=1e-14)
