"""The kernels compute the right numbers, shown without a GPU: the tests of this folder in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
COMPILES = "test_compile_report.py"  # and runs nothing

FILES = sorted(path for path in HERE.glob("test_*.py") if path.name not in (Path(__file__).name, COMPILES))


@pytest.mark.parametrize("half", [0, 1])  # minutes each: one for each of two cores
def test_kernels_in_the_interpreter(half: int) -> None:
    """A process of its own, because Triton settles at import whether it interprets."""
    files = [str(path) for path in FILES[half::2]]
    command = [sys.executable, "-P", "-m", "pytest", *files, "-q", "-p", "no:cacheprovider", "--no-header"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout, "no test was found: " + done.stdout
