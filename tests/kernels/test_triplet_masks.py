"""The masks kernel writes every byte, as the definition has it."""

import pytest
import torch

from tileloss import reference
from tileloss.functional import triplet_masks
from tileloss.kernels import triplet_masks as kernel

DTYPES = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float64, torch.float32, torch.float16]


@pytest.mark.parametrize(
    ("size", "dtype"), [(1, torch.int64), (2, torch.int64), *((17, dtype) for dtype in DTYPES), (37, torch.int64)]
)
def test_as_the_definition(
    size: int, dtype: torch.dtype, device: torch.device, poisoned_empty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_THIRDS", 32)
    torch.manual_seed(0)
    labels = torch.randint(0, 5, (size,), device=device).to(dtype)
    for triplets in (False, True) if size < 37 else (True,):
        found = triplet_masks(labels, triplets=triplets, backend="triton")
        for ours, expected in zip(found, reference.triplet_masks(labels, triplets), strict=True):
            assert ours is expected is None or torch.equal(ours, expected)


def test_labels_that_only_their_own_dtype_tells_apart(device: torch.device) -> None:
    for labels in (
        torch.tensor([2**62, 2**62 + 1, 2**62], device=device),
        torch.tensor([1.0, 1.0 + 1e-15, 1.0], dtype=torch.float64, device=device),
        torch.tensor([torch.nan, 1.0, torch.nan, 1.0], device=device),
    ):
        found = triplet_masks(labels, triplets=True, backend="triton")
        for ours, expected in zip(found, reference.triplet_masks(labels, True), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("triplets", [False, True])
def test_opcheck(triplets: bool, device: torch.device) -> None:
    arguments = torch.tensor([0, 1, 0], device=device), triplets
    torch.library.opcheck(torch.ops.tileloss.triplet_masks.default, arguments)
