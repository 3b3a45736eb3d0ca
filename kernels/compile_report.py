"""Compile every kernel for GPUs that need not be there, and say what came out.

    python -m tileloss.kernels.compile_report [--json PATH] [--target sm_90 ...] [--may-spill BYTES]

What to compile stands in `compile_cases.py`: launches over a covering set of features and dtypes, recorded instead of
run; each is then compiled ahead of time. The table shows, per kernel, configuration and
target, registers, spilled bytes, shared memory and the matrix instructions found. The status is 1 when a kernel does
not compile, when a default configuration spills or does not fit its GPU, or when a GEMM has no matrix instructions
(wgmma on Hopper). Exact float32 on NVIDIA is excused, which has none. That a kernel compiles says nothing of its
speed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import BaseBackend
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner

from tileloss.kernels.compile_cases import COVERED, GPUS, record_cases
from tileloss.kernels.launch import Launch

GEMM = "normalisers_fwd_kernel"
GEMMS = (GEMM, "pairwise_fwd_kernel", "pairwise_bwd_kernel")
MATRIX_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync", "mfma": "v_mfma"}
TYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
NOT_SHOWN = ("FLOOR", "HAS_IDS", "HAS_MASK", "num_ctas")  # said by the case, or the same everywhere


@dataclass(frozen=True)
class Job:
    """One compilation: everything as plain values, so that it travels to another process."""

    kernel: str
    module: str
    case: str
    config: str
    is_default: bool
    gpu: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[int, ...]  # the arguments known to be multiples of 16
    options: dict[str, int]


@dataclass(frozen=True)
class Row:
    """What came of a job; `error` is empty where it compiled."""

    kernel: str
    case: str
    config: str
    is_default: bool
    gpu: str
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    matrix: str = ""
    error: str = ""

    @property
    def complaint(self) -> str:
        """Why this row must not be, or an empty string."""
        if self.error:
            return f"did not compile: {self.error}"
        if self.is_default and self.spilled_bytes:
            return f"spills {self.spilled_bytes} bytes"
        if self.is_default and self.shared_bytes > GPUS[self.gpu].shared_memory:
            return f"needs {self.shared_bytes} bytes of shared memory of {GPUS[self.gpu].shared_memory}"
        if self.kernel in GEMMS and not ("ieee" in self.case and GPUS[self.gpu].target.backend == "cuda"):
            wanted = ["wgmma"] if self.gpu == "sm_90" else list(MATRIX_INSTRUCTIONS)
            if self.matrix not in wanted:
                return f"has {self.matrix or 'no'} matrix instructions, expected {' or '.join(wanted)}"
        return ""


def jobs_for(name: str) -> list[Job]:
    """What to compile for a GPU: each recorded launch in each of its configurations, equal ones once."""
    jobs: dict[str, Job] = {}
    for case, launch in record_cases(GPUS[name]):
        configs = launch.kernel.configs if isinstance(launch.kernel, Autotuner) else [None]
        for position, config in enumerate(configs if "default" in case else configs[:1]):
            job = _job(name, case, launch, config, is_default=position == 0)
            jobs.setdefault(repr(replace(job, case="")), job)
    return list(jobs.values())


def _job(gpu: str, case: str, launch: Launch, config: triton.Config | None, is_default: bool) -> Job:
    """A launch as the compiler wants it: types, constants, and which arguments are multiples of 16."""
    kernel = jit_function(launch.kernel)
    given = launch.constants | (config.all_kwargs() if config else {})
    options = {key: given.pop(key) for key in ("num_warps", "num_stages", "num_ctas", "maxnreg") if key in given}
    if GPUS[gpu].target.backend != "cuda":
        options.pop("maxnreg", None)
    constants, signature, divisible = dict(given), {}, []
    for parameter, value in zip(kernel.params, launch.arguments, strict=False):  # the constants come after
        specialised = isinstance(value, int) and not parameter.do_not_specialize
        if specialised and value == 1:
            constants[parameter.name] = 1
        elif isinstance(value, Tensor) or (specialised and value % 16 == 0):
            divisible.append(parameter.num)
        signature[parameter.name] = type_of(value)
    signature |= dict.fromkeys(constants, "constexpr")
    shown = {key: value for key, value in (given | options).items() if key not in NOT_SHOWN}
    config_name = " ".join(f"{key}={value}" for key, value in shown.items())
    return Job(
        kernel.__name__, kernel.__module__, case, config_name, is_default, gpu, signature, constants, tuple(divisible),
        options,
    )  # fmt: skip


def jit_function(kernel: Any) -> triton.JITFunction:
    """The kernel itself, under its tuner if it has one."""
    return kernel.fn if isinstance(kernel, Autotuner) else kernel


def type_of(value: Any) -> str:
    """The compiler's name for the type of an argument."""
    if isinstance(value, Tensor):
        return "*" + TYPE_NAMES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if value < 1 << 31 else "i64"


def compile_job(job: Job) -> Row:
    """Compile a job and read what the binary says of itself."""
    about = (job.kernel, job.case, job.config, job.is_default, job.gpu)
    kernel = jit_function(getattr(importlib.import_module(job.module), job.kernel))
    constants = {(kernel.arg_names.index(name),): value for name, value in job.constants.items()}
    attributes = {(position,): BaseBackend.parse_attr("D") for position in job.divisible}
    source = ASTSource(kernel, job.signature, constants, attributes)
    try:
        compiled = triton.compile(source, target=GPUS[job.gpu].target, options=dict(job.options))
    except Exception as error:
        return Row(*about, error=f"{type(error).__name__}: {error}".strip().splitlines()[0])
    listing = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    matrix = next((name for name, pattern in MATRIX_INSTRUCTIONS.items() if pattern in listing), "")
    registers, spilled = nvidia_usage(compiled.asm["cubin"]) if "cubin" in compiled.asm else amd_usage(listing)
    return Row(*about, registers, spilled, compiled.metadata.shared, matrix)


def nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of its local memory, which is where registers spill to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2]) + int(found[3])


def amd_usage(listing: str) -> tuple[int, int]:
    """Vector registers a thread and bytes spilled, from the metadata of the assembly."""
    registers, spilled = (re.search(rf"\.{key}:\s+(\d+)", listing) for key in ("vgpr_count", "vgpr_spill_count"))
    assert registers, listing[-2000:]
    assert spilled, listing[-2000:]
    return int(registers[1]), 4 * int(spilled[1])


def print_table(rows: list[Row]) -> None:
    """The rows by kernel, then target."""
    print(f"\n{'kernel':<28} {'target':<7} {'regs':>4} {'spill':>5} {'shared':>7} {'matrix':<7} case; configuration")
    for row in sorted(rows, key=lambda row: (row.kernel, row.gpu, row.case, row.config)):
        mark = " " if row.is_default else "  (tuned)"
        print(
            f"{row.kernel:<28} {row.gpu:<7} {row.registers:>4} {row.spilled_bytes:>5} {row.shared_bytes:>7} "
            f"{row.matrix or '-':<7} {row.case}; {row.config}{mark}{row.error}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel for GPUs that need not be there.")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows as JSON")
    parser.add_argument("--target", nargs="+", choices=list(GPUS), default=list(GPUS), help="compile for these alone")
    spills = "bytes that a default configuration may spill, under a Triton for which it was not chosen (%(default)s)"
    parser.add_argument("--may-spill", type=int, default=0, metavar="N", help=spills)
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="compile so many at a time")
    chosen = parser.parse_args(arguments)
    jobs = [job for gpu in chosen.target for job in jobs_for(gpu)]
    print(f"Triton {triton.__version__}: {len(jobs)} compilations. {COVERED}")
    with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("spawn")) as pool:
        rows = list(tqdm(pool.map(compile_job, jobs), total=len(jobs), unit="kernel", mininterval=2.0))
    print_table(rows)
    if chosen.json:
        report = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
        chosen.json.write_text(json.dumps(report, indent=1) + "\n")
    judged = [row if row.spilled_bytes > chosen.may_spill else replace(row, spilled_bytes=0) for row in rows]
    complaints = [
        f"{row.kernel} on {row.gpu} ({row.case}; {row.config}) {row.complaint}" for row in judged if row.complaint
    ]
    print(*complaints, sep="\n", file=sys.stderr)
    print(f"{len(rows)} compiled, {len(complaints)} not as they must be.")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
