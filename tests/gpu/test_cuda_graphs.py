"""A loss and its gradients as a CUDA graph: the host is not waited for, and a replay has the numbers of a call.

Nor is anything called that PyTorch knows to give other numbers the next time.
"""

import os
import warnings

os.environ.setdefault("TILELOSS_AUTOTUNE", "0")  # a tuner would time kernels, which takes seconds

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tileloss
from tileloss import losses

pytestmark = pytest.mark.gpu

WIDTH = 64
# one batch that no tile divides, and a small one that is materialised
SIZES = {"triton": 1501, "reference": 300}


class Given(nn.Module):
    """A model of which the embeddings are known."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features

    def get_embedding_dimension(self) -> int:
        return WIDTH


@dataclass(frozen=True)
class Case:
    """How a loss is made, how many columns it takes, and its labels by their number.

    Attributes:
        materialised: whether the definition can be captured; of every triplet it has to ask how many there are.
    """

    make: Callable[[nn.Module], nn.Module]
    columns: int = 2
    labels: Callable[[int], Tensor | None] = lambda rows: None
    materialised: bool = True


def classes(rows: int) -> Tensor:
    return torch.arange(rows, device="cuda") // 4


def binary(rows: int) -> Tensor:
    return torch.arange(rows, device="cuda") % 2


def grades(rows: int) -> Tensor:
    return torch.linspace(-1, 1, rows, device="cuda")


def of_prefixes(inner: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    return lambda model: losses.MatryoshkaLoss(model, inner(model), [64, 16, 48], [1.0, 0.25, 0.5])


CASES = {
    "in-batch": Case(losses.MultipleNegativesRankingLoss, columns=3),
    "in-batch, both ways": Case(losses.MultipleNegativesSymmetricRankingLoss),
    "every triplet": Case(losses.BatchAllTripletLoss, 1, classes, materialised=False),
    "hard triplets": Case(losses.BatchHardTripletLoss, 1, classes),
    "semi-hard triplets": Case(losses.BatchSemiHardTripletLoss, 1, classes),
    "graded pairs": Case(losses.CosineSimilarityLoss, labels=grades),
    "ranked pairs": Case(losses.CoSENTLoss, labels=grades),
    "near and far pairs": Case(losses.ContrastiveLoss, labels=binary),
    "triplets": Case(losses.TripletLoss, columns=3),
    "in-batch, of prefixes": Case(of_prefixes(losses.MultipleNegativesRankingLoss), columns=3),
    "in-batch, both ways, of prefixes": Case(of_prefixes(losses.MultipleNegativesSymmetricRankingLoss)),
    "ranked pairs, of prefixes": Case(of_prefixes(losses.CoSENTLoss), labels=grades),
}


def batch(columns: int, rows: int, seed: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(rows, WIDTH, device="cuda", generator=generator) for _ in range(columns)]


def step_of(case: Case, inputs: list[Tensor]) -> Callable[[], list[Tensor]]:
    """A call for the loss of the inputs and their gradients."""
    loss, labels = case.make(Given()), case.labels(len(inputs[0]))

    def step() -> list[Tensor]:
        value = loss([{"sentence_embedding": x} for x in inputs], labels)
        return [value.detach(), *torch.autograd.grad(value, inputs)]

    return step


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_captured_and_replayed(name: str, backend: str) -> None:
    case, rows = CASES[name], SIZES[backend]
    if backend == "reference" and not case.materialised:
        pytest.skip("the definition waits for the number of triplets")
    inputs = [x.requires_grad_() for x in batch(case.columns, rows, seed=0)]
    step = step_of(case, inputs)
    with tileloss.use_backend(backend):
        graph, found = captured(step)
        with torch.no_grad():
            for x, other in zip(inputs, batch(case.columns, rows, seed=1), strict=True):
                x.copy_(other)
        graph.replay()
        expected = step()
    assert found[0] > 0
    for replayed, called in zip(found, expected, strict=True):
        torch.testing.assert_close(replayed, called)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_deterministic_by_what_pytorch_knows(name: str, backend: str) -> None:
    step = step_of(CASES[name], [x.requires_grad_() for x in batch(CASES[name].columns, SIZES[backend], seed=0)])
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with tileloss.use_backend(backend), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step()
    finally:
        torch.use_deterministic_algorithms(False)
    refused = "does not have a deterministic implementation"
    assert not [str(warning.message) for warning in said if refused in str(warning.message)]


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of what a step does, and the tensors that a replay writes to.

    First come calls on a stream beside, as capturing asks for: they compile kernels and look at the first labels. Then
    one in which PyTorch raises where the host would wait for the device.
    """
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs
