"""The same properties of the kernels, without a GPU: a few examples each in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
# a call is slow there; the classes add nothing to the functions, and what is refused is so before a backend is chosen
CHOSEN = "test_the_definition and not test_losses"


def test_kernels_in_the_interpreter() -> None:
    """A process of its own, because Triton settles at import whether it interprets."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        str(HERE),
        "-q",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "-k",
        CHOSEN,
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout, "no test was found: " + done.stdout
