"""The compile report: what it compiles, and what it lets pass. (Its full run is `make compile-report`.)"""

import dataclasses

import pytest

pytest.importorskip("triton")

from tileloss.kernels import compile_report
from tileloss.kernels.compile_report import GEMM, GPUS, Row, compile_job, jobs_for

GOOD = Row(GEMM, "bfloat16, default", "", True, "sm_90", registers=128, shared_bytes=98304, matrix="wgmma")


@pytest.mark.parametrize("gpu", list(GPUS))
def test_every_kernel_is_in_it(gpu: str) -> None:
    jobs = jobs_for(gpu)
    assert {job.kernel for job in jobs} == {
        "unit_rows_fwd_kernel",
        "unit_rows_bwd_kernel",
        "softmax_rows_fwd_kernel",
        "known_normalisers_bwd_kernel",
        "normalisers_fwd_kernel",
        "normalisers_merge_kernel",
        "halves_kernel",
        "hardest_fwd_kernel",
        "chosen_pairs_gather_bwd_kernel",
        "chosen_pairs_collect_bwd_kernel",
        "mine_all_fwd_kernel",
        "mine_semi_hard_fwd_kernel",
        "mine_hard_fwd_kernel",
        "pairwise_fwd_kernel",
        "pairwise_bwd_kernel",
        "manhattan_fwd_kernel",
        "manhattan_bwd_kernel",
        "prefix_norms_fwd_kernel",
        "prefix_norms_bwd_kernel",
        "prefix_cosines_fwd_kernel",
        "prefix_cosines_bwd_kernel",
        "pairs_fwd_kernel",
        "pairs_bwd_kernel",
        "triplet_masks_fwd_kernel",
    }
    for kernel in {job.kernel for job in jobs}:
        assert any(job.is_default for job in jobs if job.kernel == kernel)
    features = {(job.constants["HAS_IDS"], job.constants["HAS_MASK"]) for job in jobs if job.kernel == GEMM}
    assert features == {(False, False), (True, False), (False, True)}


@pytest.mark.parametrize("gpu", ["sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", ["softmax_rows_fwd_kernel", GEMM])
def test_a_default_compiles_as_it_must(kernel: str, gpu: str) -> None:
    job = next(job for job in jobs_for(gpu) if job.kernel == kernel and job.case == "bfloat16, default")
    row = compile_job(job)
    assert row.complaint == ""
    assert row.registers > 0
    assert row.matrix == ({"sm_90": "wgmma", "gfx942": "mfma"}[gpu] if kernel == GEMM else "")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, ""),
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"spilled_bytes": 8, "is_default": False}, ""),
        ({"shared_bytes": 228 << 10}, "shared memory"),
        ({"matrix": "mma"}, "expected wgmma"),
        ({"gpu": "sm_80", "matrix": "mma"}, ""),
        ({"gpu": "sm_80", "matrix": ""}, "no matrix instructions"),
        ({"case": "float32 ieee, default", "matrix": ""}, ""),
        (
            {"case": "float32 ieee, default", "gpu": "gfx942", "matrix": "", "shared_bytes": 0},
            "no matrix instructions",
        ),
        ({"kernel": "unit_rows_fwd_kernel", "matrix": ""}, ""),
        ({"error": "PTXASError"}, "did not compile: PTXASError"),
    ],
)
def test_what_it_complains_of(change: dict, complaint: str) -> None:
    found = dataclasses.replace(GOOD, **change).complaint
    assert complaint in found
    assert bool(found) == bool(complaint)


def test_a_complaint_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    class Pool:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *_: object) -> None: ...
        def map(self, _: object, jobs: list) -> list[Row]:
            return [dataclasses.replace(GOOD, spilled_bytes=8)] + [GOOD] * (len(jobs) - 1)

    monkeypatch.setattr(compile_report, "ProcessPoolExecutor", Pool)
    assert compile_report.main(["--target", "sm_90"]) == 1
    assert "spills 8 bytes" in capsys.readouterr().err
    assert compile_report.main(["--target", "sm_90", "--may-spill", "7"]) == 1
    assert compile_report.main(["--target", "sm_90", "--may-spill", "8"]) == 0
