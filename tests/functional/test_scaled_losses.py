"""Losses whose gradients wait for the backward, in 16 bits: a gradient scaler's factor finds all of their digits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tileloss.functional import contrastive_loss, matryoshka_contrastive_loss, triplet_loss

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "in-batch": contrastive_loss,
    "in-batch, both ways": lambda x, y: contrastive_loss(x, y, directions=("query_to_doc", "doc_to_query")),
    "of prefixes": lambda x, y: matryoshka_contrastive_loss(x, y, dims=[24, 8]),
    "all triplets": lambda x, y: triplet_loss(
        torch.cat([x, y]), torch.arange(2 * len(x)) % len(x), distance="cosine", margin=0.5
    ),
}


def columns(dtype: torch.dtype) -> list[Tensor]:
    """Pairs that are alike, so long that the gradients of their cosines are smaller than float16 goes."""
    torch.manual_seed(0)
    x, noise = torch.randn(2, 40, 24)
    return [(500 * y).to(dtype).requires_grad_() for y in (x, x + noise)]


@pytest.mark.parametrize("name", LOSSES)
def test_float16_gradients_of_a_scaled_loss_have_their_digits(name: str, backend: str) -> None:
    inputs = columns(torch.float16)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = torch.autograd.grad(LOSSES[name](*inputs) * 65536.0, inputs)
    truth = torch.autograd.grad(LOSSES[name](*exact) * 65536.0, exact)
    for ours, expected in zip(found, truth, strict=True):
        assert ours.dtype == torch.float16
        assert (ours.double() - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_a_third_of_a_loss_has_a_third_of_the_gradient(name: str, dtype: torch.dtype, backend: str) -> None:
    """As when gradients of three batches add up: a factor must not be rounded to 16 bits before it is applied."""
    inputs = [(x.detach() / 500).requires_grad_() for x in columns(dtype)]
    whole = torch.cat(torch.autograd.grad(LOSSES[name](*inputs), inputs)).double()
    third = torch.cat(torch.autograd.grad(LOSSES[name](*inputs) / 3, inputs)).double()
    assert abs((third * whole).sum() * 3 / whole.square().sum() - 1) < (2e-4 if dtype == torch.float16 else 8e-4)
