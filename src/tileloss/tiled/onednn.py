"""float32 GEMMs through oneDNN, on the CPUs where MKL leaves half of the machine idle.

PyTorch multiplies float32 matrices on a CPU by MKL, which runs its AVX-512 code on Intel's processors alone, and
instructions of half the width on AMD's. That costs nothing on AMD's Zen 4, whose units are of half the width too, but
half of the rate from Zen 5 on. oneDNN, which PyTorch carries for its layers, makes no such difference. Its inner
product is reached through the operator that `torch.compile` emits for linear layers; should a build of PyTorch lack
it, or MKL serve the machine well, GEMMs go the usual way. The choice depends on the machine alone, never on timing,
so results repeat.

oneDNN falls to a reference implementation, hundreds of times slower, for a strided weight: the weights here are always
dense, or the transpose of something dense.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch
from torch import Tensor

# numbers at a time, 2 MiB: what a step made must still be in the cache when it is copied or added to where it belongs
_STEP = 1 << 19
_NARROWEST = 256  # columns of a step, however many rows there are: a GEMM of fewer is slow
_SMALLEST = 64  # of rows, columns and depth: below, a GEMM costs less than the way to oneDNN
_ZEN_5 = 26  # its family, in AMD's count
_SCHEMA = "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"


@functools.cache
def is_faster_here() -> bool:
    """Whether this machine's CPU multiplies float32 matrices faster by oneDNN than by PyTorch's own choice."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    operator = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
    if operator is None or not str(operator._schema).endswith(_SCHEMA):
        return False
    processors = Path("/proc/cpuinfo")
    return processors.exists() and has_wide_units_of_amd(processors.read_text())


def has_wide_units_of_amd(cpuinfo: str) -> bool:
    """Whether a Linux' list of processors begins with one of AMD's whose vector units are 512 bits wide."""
    family = re.search(r"^cpu family\s*:\s*(\d+)$", cpuinfo, re.MULTILINE)
    return "AuthenticAMD" in cpuinfo and family is not None and int(family[1]) >= _ZEN_5


def serves(*tensors: Tensor) -> bool:
    """Whether these operands and results are ones for oneDNN: float32 on such a CPU, and large enough."""
    return (
        all(x.dtype == torch.float32 and x.is_cpu and min(x.shape) >= _SMALLEST for x in tensors) and is_faster_here()
    )


def multiply(
    a: Tensor,  # (N, K)
    b: Tensor,  # (M, K) contiguous
    out: Tensor,  # (N, M)
) -> Tensor:
    """`out = a @ b.T`; memory beside it: one step of the result."""
    for columns in _steps(len(b), len(a)):
        out[:, columns].copy_(_linear(a, b[columns]))
    return out


def accumulate(
    total: Tensor,  # (N, M)
    a: Tensor,  # (N, K)
    b: Tensor,  # (K, M) contiguous
) -> Tensor:
    """`total += a @ b`; memory beside it: N x M, and one step of `a` where its rows are not dense."""
    if a.is_contiguous():
        return total.add_(_linear(a, b.t()))
    for inner in _steps(len(b), len(a)):
        total.add_(_linear(a[:, inner].contiguous(), b[inner].t()))
    return total


def accumulate_by_columns(
    total: Tensor,  # (N, M)
    a: Tensor,  # (N, K)
    b: Tensor,  # (M, K) contiguous
) -> Tensor:
    """`total += a @ b.T`; memory beside it: one step of the result."""
    for columns in _steps(len(b), len(a)):
        total[:, columns].add_(_linear(a, b[columns]))
    return total


def accumulate_transposed(
    total: Tensor,  # (N, M)
    a: Tensor,  # (K, N)
    b: Tensor,  # (K, M)
) -> Tensor:
    """`total += a.T @ b`; memory beside it: two steps, of `a` or of it and the result; a strided `b` again."""
    weight = b.contiguous().t()
    for rows in _steps(len(total), max(len(a), b.shape[1])):
        # only what is dense is transposed fast, and what has no name is freed at once
        total[rows].add_(_linear(a[:, rows].contiguous().t().contiguous(), weight))
    return total


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _steps(size: int, across: int) -> list[slice]:
    """Parts of `size` columns of `across` numbers each."""
    step = max(_STEP // across, _NARROWEST)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
