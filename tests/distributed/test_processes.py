"""Losses over several processes are those of one: every case of this folder, in two and in four processes on gloo."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("sentence_transformers")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch is built without gloo", allow_module_level=True)

HERE = Path(__file__).parent
NAMES = [
    name
    for file in sorted(HERE.glob("cases_of_*.py"))
    for name in re.findall(r"^@case\ndef (\w+)", file.read_text(), flags=re.MULTILINE)
]


@pytest.fixture(scope="module", params=[2, 4])
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """Of each process, what went wrong in which case."""
    folder = tmp_path_factory.mktemp("processes")
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), str(rank), str(request.param), str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(request.param)
    ]
    outputs = [process.communicate()[0] for process in started]
    assert not any(process.returncode for process in started), "\n".join(outputs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("name", NAMES)
def test_in_several_processes(name: str, failures: list[dict[str, str | None]]) -> None:
    for rank, found in enumerate(failures):
        assert found[name] is None, f"in process {rank} of {len(failures)}:\n{found[name]}"
