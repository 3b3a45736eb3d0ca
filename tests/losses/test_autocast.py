"""Under autocast the losses count bfloat16 embeddings as given and are float32, however they round without it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .test_compile import CASES, WIDTH, made, of_embeddings

# its classifier is a layer like the model's, which autocast narrows
OF_A_LAYER = {"SoftmaxLoss"}


def narrowed(x: Tensor) -> Tensor:
    return x.bfloat16().float() if x.is_floating_point() else x


def found(name: str, inputs: list[Tensor], labels: Any, autocast: bool = False) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    # around the forward alone, as it is meant to be used
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = of_embeddings(made(name))(leaves, labels)
        value = sum(value.values()) if isinstance(value, dict) else value
    return value.detach(), list(torch.autograd.grad(value, leaves))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("rows", [12, 300])
@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_the_same_numbers_in_float32(name: str, rows: int) -> None:
    torch.manual_seed(0)
    inputs = [narrowed(torch.randn(rows, WIDTH)) for _ in range(CASES[name].columns)]
    labels = tree_map_only(Tensor, narrowed, CASES[name].labels(rows))
    expected, _ = found(name, inputs, labels)
    inputs = [x.bfloat16() for x in inputs]
    if name not in OF_A_LAYER:
        _, gradients = found(name, inputs, labels)
    loss, narrow = found(name, inputs, labels, autocast=True)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2**-8 if name in OF_A_LAYER else 1e-5, atol=1e-6)
    assert all(gradient.dtype == torch.bfloat16 for gradient in narrow)
    if name not in OF_A_LAYER:
        torch.testing.assert_close(narrow, gradients)
