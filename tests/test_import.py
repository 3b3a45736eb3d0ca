"""Importing tileloss is light and touches no device, and none of it needs what only training or a GPU needs.

Each claim is checked in a process of its own, away from the checkout, because this one has long imported everything.
"""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# what `import tileloss` must not pull in: everything that is optional, and the slow parts of torch
HEAVY = (
    "triton",
    "transformers",
    "datasets",
    "matplotlib",
    "sentence_transformers",
    "accelerate",
    "tokenizers",
    "torch._dynamo",
    "torch._inductor",
)

PUBLIC = "import tileloss, tileloss.losses, tileloss.functional, tileloss.backend"

# how Python is told that a module is not there: an import raises ModuleNotFoundError, a search finds nothing
HIDE_TRITON = "import sys; sys.modules['triton'] = None"


def run(code: str, cwd: Path) -> str:
    """Run `code` in a fresh interpreter and give back what it printed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_pulls_in_nothing_optional(tmp_path: Path) -> None:
    code = f"import torch, sys; before = set(sys.modules); {PUBLIC}; print(*(set(sys.modules) - before))"
    loaded = set(run(code, tmp_path).split())
    assert "tileloss.functional" in loaded
    unwanted = sorted(name for name in loaded if name in HEAVY)
    assert not unwanted


def test_a_loss_runs_where_triton_is_missing(tmp_path: Path) -> None:
    """As on macOS and Windows: the import, the automatic choice of a backend and a backward pass."""
    code = f"""{HIDE_TRITON}
import torch
{PUBLIC}
queries, docs = (torch.randn(200, 8, requires_grad=True) for _ in range(2))
tileloss.functional.contrastive_loss(queries, docs).backward()
assert queries.grad.isfinite().all() and docs.grad.isfinite().all()
try:
    tileloss.functional.contrastive_loss(queries, docs, backend="triton")
except RuntimeError as error:
    print(error)
"""
    assert "Triton is not installed" in run(code, tmp_path)


def test_import_asks_no_device(tmp_path: Path) -> None:
    """Every question to torch.cuda would raise here: a fork after such a question could not use the GPU."""
    code = f"""
import torch

def touched(*args, **kwargs):
    raise AssertionError("torch.cuda was asked at import time")

for name in ("is_available", "device_count", "current_device", "get_device_properties", "get_device_capability",
             "get_device_name", "init", "_lazy_init", "synchronize", "mem_get_info"):
    assert hasattr(torch.cuda, name)
    setattr(torch.cuda, name, touched)
{PUBLIC}
assert not torch.cuda.is_initialized()
"""
    run(code, tmp_path)


def test_import_time_is_torchs(tmp_path: Path) -> None:
    """After torch, which takes seconds, tileloss adds little."""
    code = f"""
from time import perf_counter
start = perf_counter()
import torch
middle = perf_counter()
{PUBLIC}
print((perf_counter() - middle) / (middle - start))
"""
    assert float(run(code, tmp_path)) < 0.5


def test_the_kernels_folder_shadows_nothing() -> None:
    """transformers looks for a package named `kernels`; ours is `tileloss.kernels` and must not answer for it."""
    assert importlib.util.find_spec("tileloss.kernels") is not None
    spec = importlib.util.find_spec("kernels")
    found = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
    ours = [place for place in found if place and Path(place).resolve().is_relative_to(ROOT / "kernels")]
    assert not ours, (
        "`import kernels` finds the folder of this checkout, because its root is on sys.path. "
        "Start the tests with `make test` or `.venv/bin/pytest`, not with `python -m pytest`."
    )


@pytest.mark.parametrize("name", ["tileloss", "tileloss.losses", "tileloss.functional"])
def test_all_names_what_exists(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__
    assert all(hasattr(module, public) for public in module.__all__)
