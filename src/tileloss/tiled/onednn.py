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

# columns at a time: the result of a step must still be in the cache when it is copied or added to where it belongs
_COLUMNS = 1024
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
    """`out = a @ b.T`; memory beside it: one step's N x 1024."""
    for columns in _steps(len(b)):
        out[:, columns].copy_(_linear(a, b[columns]))
    return out


def accumulate(
    total: Tensor,  # (N, M)
    a: Tensor,  # (N, K)
    b: Tensor,  # (K, M) contiguous
) -> Tensor:
    """`total += a @ b`; memory beside it: one step's N x 1024 of `a`, where its rows are not dense, and N x M."""
    if a.is_contiguous():
        return total.add_(_linear(a, b.t()))
    for inner in _steps(len(b)):
        total.add_(_linear(a[:, inner].contiguous(), b[inner].t()))
    return total


def accumulate_by_columns(
    total: Tensor,  # (N, M)
    a: Tensor,  # (N, K)
    b: Tensor,  # (M, K) contiguous
) -> Tensor:
    """`total += a @ b.T`; memory beside it: one step's N x 1024."""
    for columns in _steps(len(b)):
        total[:, columns].add_(_linear(a, b[columns]))
    return total


def accumulate_transposed(
    total: Tensor,  # (N, M)
    a: Tensor,  # (K, N)
    b: Tensor,  # (K, M)
) -> Tensor:
    """`total += a.T @ b`; memory beside it: one step's 1024 x K of `a`, or two, and 1024 x M; a strided `b` again."""
    weight = b.contiguous().t()
    for rows in _steps(len(total)):
        step = a[:, rows].contiguous()  # only what is dense is transposed fast
        total[rows].add_(_linear(step.t().contiguous(), weight))
    return total


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _steps(size: int) -> list[slice]:
    return [slice(start, min(start + _COLUMNS, size)) for start in range(0, size, _COLUMNS)]
