"""Paired similarities under the oracle's names: their numbers, and how other people's functions are recognised."""

import functools

import pytest
import torch
from torch import Tensor, nn

from tileloss import paired
from tileloss.errors import InputError
from tileloss.paired import PAIRED, pairwise_cos_sim, recognise_paired
from tileloss.similarity import similarity_fct_name

oracle = pytest.importorskip("sentence_transformers.util")

NAMESAKES = {name: getattr(oracle, fn.__name__) for name, fn in PAIRED.functions.items() if name != "torch_cosine"}


class Model:
    """Enough of a SentenceTransformer for its bound method to be told."""

    similarity_fn_name: object = "manhattan"

    def similarity_pairwise(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMESAKES)
def test_values_are_the_oracles(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 7, 5).to(dtype)
    a[0] = 0.0
    found, expected = (function(a, b) for function in (PAIRED.functions[name], NAMESAKES[name]))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_lists_and_sparse_matrices_are_taken() -> None:
    rows = [[1.0, 0.0], [3.0, 4.0]]
    for function in PAIRED.functions.values():
        expected = function(torch.tensor(rows), torch.ones(2, 2))
        assert torch.equal(function(rows, torch.ones(2, 2)), expected)  # type: ignore[arg-type]
        assert torch.equal(function(torch.tensor(rows).to_sparse(), torch.ones(2, 2)), expected)


@pytest.mark.parametrize("name", PAIRED.functions)
def test_every_form_is_recognised(name: str) -> None:
    forms = [name, PAIRED.functions[name], *([NAMESAKES[name]] if name in NAMESAKES else [])]
    assert [recognise_paired(form) for form in forms] == [name] * len(forms)


def test_a_models_method_and_enumeration_are_recognised() -> None:
    model = Model()
    assert recognise_paired(model.similarity_pairwise) == "manhattan"
    model.similarity_fn_name = oracle.SimilarityFunction.COSINE
    assert recognise_paired(model.similarity_pairwise) == "cosine"
    assert recognise_paired(oracle.SimilarityFunction.EUCLIDEAN) == "euclidean"


def test_strangers_are_left_alone() -> None:
    def pairwise_cos_sim(a: Tensor, b: Tensor) -> Tensor:
        return a.sum(-1)

    for stranger in (
        pairwise_cos_sim,
        nn.CosineSimilarity(),
        functools.partial(paired.pairwise_cos_sim),
        oracle.cos_sim,
    ):
        assert recognise_paired(stranger) is stranger
    for wrong in ("nothing", 3):
        with pytest.raises(InputError, match="similarity must be one of"):
            recognise_paired(wrong)  # type: ignore[arg-type]


def test_names_for_configurations() -> None:
    model = Model()
    forms = ["angle", pairwise_cos_sim, functools.partial(pairwise_cos_sim, b=1), model.similarity_pairwise]
    expected = ["pairwise_angle_sim", "pairwise_cos_sim", "pairwise_cos_sim(b=1)", "pairwise_manhattan_sim"]
    assert [similarity_fct_name(form, PAIRED) for form in forms] == expected  # type: ignore[arg-type]
