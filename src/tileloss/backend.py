"""Which implementation serves a tensor, and why.

Three backends compute the same numbers. `reference` materialises the matrices in plain PyTorch and leaves gradients to
autograd: the definition, and the fastest for small batches. `tiled` walks over row blocks with hand-derived gradients:
bounded memory on any device. `triton` is the same walk with fused passes in Triton, for CUDA, ROCm and XPU.

"auto" takes the best that can run: triton on a device that has it, tiled elsewhere, reference below the size where
blocks pay. When a feature of the call rules the best one out, the choice falls back and says so once. A backend that
was asked for by name never falls back: it runs, or `BackendError` says why it cannot.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tileloss.errors import BackendError, FallbackWarning, InputError, ShapeError

BACKENDS = ("reference", "tiled", "triton")
ENVIRONMENT_VARIABLE = "TILELOSS_BACKEND"
# read once: a look at the environment costs as much as a tenth of a small batch's loss
_environment = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"

_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None  # looks for it without importing it
_TRITON_DEVICES = ("cuda", "xpu")  # ROCm tensors call themselves cuda
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# the number of similarities below which the materialised form is at least as fast: measured on two CPU cores, where
# both take the same time at 256 x 256, and a guess on the side of safety for GPUs
_SMALL = {"cpu": 256 * 256, "cuda": 1024 * 1024, "xpu": 1024 * 1024}

_TRANSFORMED = "transforms of torch.func see through the materialised form alone"

_Fn = TypeVar("_Fn", bound=Callable[..., Any])
_forced: str | None = None
_said: set[str] = set()
_recordings: list[list[Choice]] = []


class Choice(NamedTuple):
    """A backend's name and, in a sentence, why it was chosen."""

    backend: str
    reason: str


def _fastest(backend: str, kind: str) -> Choice:
    return Choice(backend, f"it is the fastest on {kind}")


# made once: small batches feel even that
_SMALL_CHOICE = Choice("reference", "at this size the materialised form is fastest")
_CPU_CHOICE = _fastest("tiled", "cpu")


def _check_name(name: str, origin: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise InputError(f"{origin} must be 'auto' or one of {list(BACKENDS)}, got {name!r}.")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend for the calls made inside the block; "auto" restores the automatic choice there.

    Args:
        name: "reference", "tiled", "triton" or "auto". It outranks the environment variable TILELOSS_BACKEND.

    Raises:
        InputError: for any other name. A backend that cannot run raises `BackendError` at the call that needs it.

    >>> with use_backend("reference"):
    ...     loss = contrastive_loss(queries, docs)  # doctest: +SKIP
    """
    global _forced
    before, _forced = _forced, _check_name(name, "the backend")
    try:
        yield
    finally:
        _forced = before


@contextmanager
def recorded() -> Iterator[list[Choice]]:
    """The choices made by the calls inside the block, in their order.

    >>> with recorded() as choices:
    ...     loss = contrastive_loss(queries, docs)  # doctest: +SKIP
    """
    choices: list[Choice] = []
    _recordings.append(choices)
    try:
        yield choices
    finally:
        _recordings.pop()


def accepts_backend(function: _Fn) -> _Fn:
    """Let the keyword `backend` of a functional op force a backend for that one call.

    The op declares it, for those who read signatures, and never sees it.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        if backend is None:
            return function(*args, **kwargs)
        with use_backend(backend):
            return function(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


def requested() -> str:
    """The backend that was asked for: by the enclosing `use_backend`, else by TILELOSS_BACKEND, else "auto".

    The environment counts as it was when tileloss was imported.
    """
    if _forced is not None:
        return _forced
    if _environment == "auto":
        return _environment
    return _check_name(_environment, f"the environment variable {ENVIRONMENT_VARIABLE}")


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, which needs no GPU and serves CPU tensors (slowly, for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot serve such a tensor, or None."""
    if not _TRITON_IS_INSTALLED:
        return "Triton is not installed (on Linux: pip install triton)"
    if device.type not in _TRITON_DEVICES and not (device.type == "cpu" and interpreting()):
        return f"Triton has no kernels for {device.type} tensors"
    if dtype not in _TRITON_DTYPES:
        return f"the Triton kernels do not compute in {str(dtype).removeprefix('torch.')}"
    return None


def device_type(tensor: Tensor) -> str:
    """The type of a tensor's device. Torch makes that name anew at every look, which small batches of a CPU feel."""
    return "cpu" if tensor.is_cpu else tensor.device.type


def is_small(tensor: Tensor, similarities: int) -> bool:
    """Whether a call chooses the materialised form for its size alone; counts as a choice where it does."""
    if requested() != "auto" or similarities > _SMALL.get(device_type(tensor), 0):
        return False
    for choices in _recordings:
        choices.append(_SMALL_CHOICE)
    return True


def choose(
    tensor: Tensor,
    similarities: int | None = None,
    obstacles: Mapping[str, str] | None = None,
) -> Choice:
    """The backend for one call.

    Args:
        tensor: any of the call's inputs; its device and dtype decide.
        similarities: how many entries the call's matrices would have; None leaves the size out of the choice.
        obstacles: backend name -> why this call's features rule it out.

    Raises:
        BackendError: when a backend was asked for by name and cannot run.
    """
    choice = _choice(tensor, similarities, obstacles)
    for choices in _recordings:
        choices.append(choice)
    return choice


def _choice(tensor: Tensor, similarities: int | None, obstacles: Mapping[str, str] | None) -> Choice:
    name, kind = requested(), device_type(tensor)
    # first of all, because a small batch is where microseconds count
    if name == "auto" and similarities is not None and similarities <= _SMALL.get(kind, 0):
        return _SMALL_CHOICE
    best = "triton" if kind in _TRITON_DEVICES and _TRITON_IS_INSTALLED else "tiled"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        obstacles = {"tiled": _TRANSFORMED, "triton": _TRANSFORMED}
    if name == "auto" and best == "tiled" and not obstacles:
        return _CPU_CHOICE if kind == "cpu" else _fastest(best, kind)
    obstacles = dict(obstacles or {})
    device_obstacle = _triton_obstacle(tensor.device, tensor.dtype)
    if device_obstacle:
        obstacles["triton"] = device_obstacle
    if name != "auto":
        if name in obstacles:
            raise BackendError(f"The backend {name!r} was asked for and cannot run: {obstacles[name]}.")
        return Choice(name, "it was asked for by name")
    for name in (best, "tiled"):
        if name not in obstacles:
            break
    else:
        name = "reference"
    if name == best:
        return _fastest(name, kind)
    reason = obstacles[best]
    say_once(f"tileloss falls back from the {best!r} to the {name!r} backend: {reason}.")
    return Choice(name, f"{best!r} was ruled out: {reason}")


def say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, FallbackWarning, stacklevel=2)


def explain(
    tensor: Tensor,  # (B, D)
) -> str:
    """What would run for a batch of embeddings like `tensor`, and why: a sentence or two, for people to read.

    Raises:
        ShapeError: for a tensor that is no matrix.

    >>> print(explain(torch.randn(4096, 384)))
    An in-batch loss over 4,096 rows of 384 (float32, cpu) runs on the 'tiled' backend: it is the fastest on cpu.
    The 'triton' backend cannot serve it: Triton has no kernels for cpu tensors.
    """
    if tensor.ndim != 2:
        raise ShapeError(f"explain takes a matrix of embeddings (rows, dimension), got shape {tuple(tensor.shape)}.")
    rows, width = tensor.shape
    dtype = str(tensor.dtype).removeprefix("torch.")
    subject = f"An in-batch loss over {rows:,} rows of {width:,} ({dtype}, {tensor.device})"
    try:
        choice = choose(tensor, rows * rows)
    except BackendError as error:
        return f"{subject} would raise BackendError. {error}"
    obstacle = _triton_obstacle(tensor.device, tensor.dtype)
    why_not = f"\nThe 'triton' backend cannot serve it: {obstacle}." if obstacle and choice.backend != "triton" else ""
    return f"{subject} runs on the {choice.backend!r} backend: {choice.reason}.{why_not}"
