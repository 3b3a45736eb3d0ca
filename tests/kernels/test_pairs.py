"""Paired similarities and distances in Triton against float64: values and gradients, strides, dtypes, bits."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tileloss.functional import paired_distance, paired_similarity
from tileloss.kernels import unit_rows

CALLS: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
    *((paired_similarity, {"similarity": name}) for name in ("cosine", "torch_cosine", "dot", "angle", "euclidean")),
    *((paired_distance, {"metric": name, "eps": 1e-3}) for name in ("euclidean", "manhattan")),
    (paired_distance, {"metric": "squared_euclidean"}),
]
NAMES = ["-".join(map(str, options.values())) for _, options in CALLS]


@pytest.fixture(autouse=True)
def _narrow_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_rows, "_WIDEST_BLOCK", 32)


def matrices(size: int, width: int, count: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, width).to(device, dtype) for _ in range(count)]


def all_of(
    inputs: Sequence[Tensor], call: Callable[..., Tensor], options: dict[str, Any], backend: str
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    found = call(leaves[0], leaves[1:], **options, backend=backend)
    weights = torch.linspace(0.5, 1.5, found.numel(), device=found.device, dtype=found.dtype).view(found.shape)
    return [found.detach(), *torch.autograd.grad((weights * found).sum(), leaves)]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("call", "options"), CALLS, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("size", "width", "count"), [(2, 3, 2), (3, 65, 3), (2, 100, 4)])
def test_as_exact_as_eager(
    size: int,
    width: int,
    count: int,
    dtype: torch.dtype,
    call: Callable[..., Tensor],
    options: dict[str, Any],
    device: torch.device,
) -> None:
    """An error of at most three times that of a formula that computes in the dtype throughout, plus a little."""
    inputs = matrices(size, width, count, dtype, device)
    truth = all_of([x.double() for x in inputs], call, options, "reference")
    eager, found = (all_of(inputs, call, options, name) for name in ("reference", "triton"))
    assert [x.dtype for x in found] == [torch.float32] + [dtype] * count
    for part, exact in enumerate(truth):
        errors = [((x[part].double() - exact).norm() / exact.norm()).item() for x in (found, eager)]
        assert errors[0] <= 3 * errors[1] + (1e-4 if part else 1e-5), part


@pytest.mark.parametrize(("call", "options"), CALLS, ids=NAMES)
def test_zero_tiny_and_equal_rows(call: Callable[..., Tensor], options: dict[str, Any], device: torch.device) -> None:
    """Row for row, for the gradients of rows near zero are large; and a nan."""
    a, b, c = matrices(10, 5, 3, torch.float32, device)
    a[0], b[1], a[2], b[2], a[3], c[7] = 0.0, 0.0, 0.0, 0.0, b[3], a[7]
    a[4], b[5], a[6], b[6] = 1e-9 * a[4], 1e-10 * b[5], 1e-14 * a[6], 1e-13 * b[6]
    a[9, 1] = float("nan")
    found, truth = (
        all_of(inputs, call, options, name)
        for inputs, name in (((a, b, c), "triton"), ([x.double() for x in (a, b, c)], "reference"))
    )
    for x, y in zip(found, truth, strict=True):
        y = y.view(10, -1)
        x = x.double().view(10, -1)
        assert torch.equal(x.isnan().any(1), y.isnan().any(1))
        assert ((x - y).norm(dim=1) <= 1e-5 * y.norm(dim=1) + 1e-5)[:9].all()


@pytest.mark.usefixtures("poisoned_empty")
def test_strides_and_expanded_rows(device: torch.device) -> None:
    a, b = matrices(3, 20, 2, torch.float32, device)
    for call, options in CALLS[2:7]:
        expected = all_of([a[:, ::2].contiguous(), b[:1, :10].repeat(3, 1)], call, options, "triton")
        found = all_of([a[:, ::2], b[:1, :10].expand(3, -1)], call, options, "triton")
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.usefixtures("poisoned_empty")
def test_some_gradients_are_wanted(device: torch.device) -> None:
    inputs = matrices(2, 7, 4, torch.float16, device)
    for call, options in CALLS[3:5]:
        every = all_of(inputs, call, options, "triton")
        for wanted in ((True, False, False, False), (False, True, False, True), (False, False, False, True)):
            leaves = [x.clone().requires_grad_(need) for x, need in zip(inputs, wanted, strict=True)]
            found = call(leaves[0], leaves[1:], **options, backend="triton")
            weights = torch.linspace(0.5, 1.5, found.numel(), device=device).view(found.shape)
            (weights * found).sum().backward()
            for x, need, expected in zip(leaves, wanted, every[1:], strict=True):
                assert (x.grad is not None) == need
                assert x.grad is None or torch.equal(x.grad, expected)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_inputs_of_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
    inputs = [x.to(dtype) for x, dtype in zip(matrices(6, 33, 2, torch.float16, device), dtypes, strict=True)]
    found = all_of(inputs, *CALLS[0], "triton")
    truth = all_of([x.double() for x in inputs], *CALLS[0], "reference")
    assert [x.dtype for x in found] == [torch.float32, *dtypes]
    for x, y in zip(found, truth, strict=True):
        assert (x.double() - y).norm() <= 1e-3 * y.norm()


def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    inputs = matrices(2, 100, 4, torch.float32, device)
    for call, options in CALLS[:4]:
        first, second = (all_of(inputs, call, options, "triton") for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
