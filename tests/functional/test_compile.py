"""Every public function under torch.compile: one graph, the eager numbers, and no new graph for another batch size."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import tileloss
from tileloss import Guide, functional

WIDTH = 8
SIZES = (12, 20, 28)  # small for every function: the threshold where another backend is chosen lies above
# its results have as many entries as there are triplets, which no compiler knows beforehand
NOT_COMPILED = {"triplet_masks"}
# where no compiler forbids it: labels that may be nan
LOOKS_AT_VALUES = {"ranking"}


@dataclass(frozen=True)
class Case:
    """A function, and the number of matrices that it is called with, beside classes and grades of the rows."""

    function: str
    call: Callable[..., object]
    materialised: bool = True  # whether the definition can be compiled as well


def classes(a: Tensor) -> Tensor:
    return torch.arange(a.shape[0]) % 3


def loss(name: str, **options: object) -> Case:
    function = getattr(functional, name)
    return Case(name, lambda a, b: function(a, b, **options))


def triplets(mining: str, **options: object) -> Case:
    def call(a: Tensor, b: Tensor) -> Tensor:
        return functional.triplet_loss(a, classes(a), mining=mining, **options)

    # of "all" the definition gathers as many rows as there are pairs
    return Case("triplet_loss", call, materialised=mining != "all")


ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
CASES = {
    "contrastive": loss("contrastive_loss"),
    "contrastive with statistics": loss("contrastive_loss_with_stats", directions=ALL[::2]),
    "contrastive in all directions": loss("contrastive_loss", directions=ALL, hardness=("all_negatives", 2.0)),
    "contrastive without some": Case(
        "contrastive_loss", lambda a, b: functional.contrastive_loss(a, b, exclude=classes(a))
    ),
    "guided": Case("contrastive_loss", lambda a, b: functional.contrastive_loss(a, b, exclude=Guide(b, a))),
    "matryoshka": loss("matryoshka_contrastive_loss", dims=[8, 4]),
    "matryoshka with statistics": loss("matryoshka_contrastive_loss_with_stats", dims=[8, 4]),
    "all triplets": triplets("all"),
    "hard triplets": triplets("hard", distance="cosine"),
    "hard triplets, soft margin": triplets("hard", margin="soft"),
    "semi-hard triplets": triplets("semi_hard"),
    "triplets with statistics": Case(
        "triplet_loss_with_stats", lambda a, b: functional.triplet_loss_with_stats(a, classes(a), mining="hard")
    ),
    "hardest": loss("hardest_negatives"),
    "distances": loss("pairwise_distance", metric="manhattan"),
    "distances to itself": Case("pairwise_distance", lambda a, b: functional.pairwise_distance(a)),
    "similarities": loss("pairwise_similarity"),
    "paired distances": loss("paired_distance"),
    "paired similarities": Case("paired_similarity", lambda a, b: functional.paired_similarity(a, [b, a.tanh()])),
    "prefixes": loss("prefix_cosines", dims=[8, 4]),
    "classified pairs": Case(
        "pair_logits", lambda a, b: functional.pair_logits(a, b, torch.linspace(-1, 1, 9 * WIDTH).view(3, -1))
    ),
    "ranking": Case("ranking_loss", lambda a, b: functional.ranking_loss(a.sum(dim=1), b[:, 0].detach())),
    "dispersion": Case("dispersion", lambda a, b: functional.dispersion(a)),
}


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [x for part in (result.values() if isinstance(result, dict) else result) for x in tensors(part)]


def results_and_gradients(call: Callable[..., object], size: int) -> list[Tensor]:
    torch.manual_seed(size)
    inputs = [torch.randn(size, WIDTH, requires_grad=True) for _ in range(2)]
    found = tensors(call(*inputs))
    total = sum(x.double().sum() for x in found if x.requires_grad)
    return [x.detach() for x in found] + [
        torch.zeros(()) if g is None else g for g in torch.autograd.grad(total, inputs, allow_unused=True)
    ]


def test_every_function_is_here() -> None:
    functions = {name for name in functional.__all__ if name[0].islower()}
    assert {case.function for case in CASES.values()} == functions - NOT_COMPILED


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_one_graph_and_another_for_all_other_sizes(name: str, backend: str) -> None:
    case = CASES[name]
    if backend == "reference" and not case.materialised:
        pytest.skip("the definition's shapes depend on the labels")
    torch.compiler.reset()
    # what autograd makes of the operators is compiled too; of the definition it is PyTorch's own affair, and slow
    counter = CompileCounterWithBackend("aot_eager" if backend == "tiled" else "eager")
    compiled = torch.compile(case.call, fullgraph=True, backend=counter)
    with tileloss.use_backend(backend):
        for size in SIZES:
            expected = results_and_gradients(case.call, size)
            for ours, eager in zip(results_and_gradients(compiled, size), expected, strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert counter.frame_count == 2, "the first size, and then any"


@pytest.mark.parametrize("name", sorted(CASES.keys() - LOOKS_AT_VALUES))
def test_fake_tensors_have_results_of_the_same_shapes(name: str) -> None:
    """As a program wants them that counts memory before there is any."""
    with tileloss.use_backend("tiled"):
        expected = results_and_gradients(CASES[name].call, SIZES[0])
        with FakeTensorMode():
            found = results_and_gradients(CASES[name].call, SIZES[0])
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]
