"""What only a GPU can show of the classifier over pairs: full-size blocks, the same bits twice, memory, silence."""

import warnings

import pytest
import torch
from torch import Tensor

from tileloss.functional import pair_logits
from tileloss.reference.pair_classifier import PairParts
from tileloss.reference.pair_classifier import pair_logits as definition

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PARTS = ("rep", "difference", "multiplication")


def inputs(size: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Embeddings of a dtype; a float32 weight of three classes, and its bias."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = (size, width), (size, width), (3, 4 * width), (3,)
    given = [torch.randn(shape, device="cuda", generator=generator) for shape in shapes]
    return [x.to(dtype if place < 2 else torch.float32).requires_grad_() for place, x in enumerate(given)]


def all_of(logits: Tensor, given: list[Tensor]) -> list[Tensor]:
    return [logits.detach(), *torch.autograd.grad(logits.tanh().sum(), given)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_blocks_without_a_warning(dtype: torch.dtype) -> None:
    given = inputs(45_001, 768, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = all_of(pair_logits(*given, concatenate=PARTS), given)
    doubles = [x.detach().double().requires_grad_() for x in given]
    truth = all_of(definition(*doubles, PairParts(True, True, True)), doubles)  # type: ignore[arg-type]
    rounding = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for ours, expected in zip(found, truth, strict=True):
        assert (ours.double() - expected).norm() < rounding * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    given = inputs(30_000, 384, dtype)
    first, second = (all_of(pair_logits(*given, concatenate=PARTS), given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_copy_of_the_embeddings() -> None:
    given = inputs(200_000, 768, torch.float32)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    all_of(pair_logits(*given, concatenate=PARTS), given)
    gradients = 2 * 200_000 * 768 * 4
    assert torch.cuda.max_memory_allocated() - before < gradients + 5 * (64 << 20)
