"""Launches: recorded, tuned alike for sizes alike, and with factors that stay on the device."""

import pytest
import torch
import triton
from triton.runtime.autotuner import Autotuner

from tileloss.kernels import launch, normalisers, unit_rows


def test_recorded_launches_do_not_run() -> None:
    x = torch.empty(8, 4, device="meta")
    with launch.recorded(shared_memory=99 << 10) as launches:
        unit_rows.unit_rows(x, torch.float16)
        assert launch.shared_memory(x.device) == 99 << 10
    (only,) = launches
    assert only.kernel is unit_rows.unit_rows_fwd_kernel
    assert only.arguments[0] is x
    assert only.constants["BLOCK"] == 4


def test_sizes_between_two_powers_of_two_tune_alike() -> None:
    assert launch.bucket(4097, 768) == launch.bucket(8192, 1024) != launch.bucket(4096, 768)
    assert launch.bucket(64, 4096) != launch.bucket(4096, 64)


def test_only_what_keeps_the_order_of_sums_is_tuned() -> None:
    first, *others = normalisers.CONFIGS
    assert all(other.num_warps == first.num_warps for other in others)
    assert all(other.kwargs.keys() == {"GROUP"} for other in others)


@pytest.mark.parametrize(("setting", "count"), [("0", 1), ("1", 2)])
def test_tuning_can_be_switched_off(setting: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.AUTOTUNE_VARIABLE, setting)
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    configs = [triton.Config({}, num_stages=stages) for stages in (2, 3)]
    tuner = launch.tuned(configs, key=["width"])(unit_rows.unit_rows_fwd_kernel)
    assert isinstance(tuner, Autotuner)
    assert tuner.configs == configs[:count]


def test_a_factor_is_a_detached_float32_scalar() -> None:
    scale = torch.tensor([20.0], dtype=torch.double, requires_grad=True)
    for value in (20.0, scale):
        factor = launch.as_scalar(value, torch.device("cpu"))
        assert factor.shape == ()
        assert factor.dtype == torch.float32
        assert factor.item() == 20.0
        assert not factor.requires_grad
