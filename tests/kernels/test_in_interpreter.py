"""The kernels compute the right numbers, shown without a GPU: the tests of this folder in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


@pytest.mark.parametrize("half", [0, 1])  # minutes each: one for each of two cores
def test_kernels_in_the_interpreter(half: int) -> None:
    """A process of its own, because Triton settles at import whether it interprets."""
    others = [f"--ignore={path}" for path in sorted(HERE.glob("test_*.py"))[1 - half :: 2]]
    command = [sys.executable, "-P", "-m", "pytest", str(HERE), *others, "-q", "-p", "no:cacheprovider", "--no-header"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout, "no test was found: " + done.stdout
