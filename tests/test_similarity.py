"""The similarities: their numbers, and how other people's functions are recognised as them."""

import functools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tileloss import similarity as ours
from tileloss.errors import InputError
from tileloss.similarity import (
    SIMILARITIES,
    full_precision,
    is_rowwise,
    recognise,
    rowwise,
    similarity_fct_name,
    torch_cosine,
    up,
)

oracle = pytest.importorskip("sentence_transformers.util")

NAMESAKES = {name: getattr(oracle, fn.__name__) for name, fn in SIMILARITIES.items() if name != "torch_cosine"}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Model:
    """Enough of a SentenceTransformer for its bound `similarity` to be told."""

    similarity_fn_name: object = "dot"

    def similarity(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b.T

    def similarity_pairwise(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_torch_cosine_is_pytorchs_near_zero_too(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 3, dtype=dtype), torch.randn(6, 3, dtype=dtype)
    a[0], b[1] = 0.0, 1e-6
    results = []
    for function in (torch_cosine, lambda x, y: F.cosine_similarity(x[:, None], y[None], dim=-1)):
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        matrix = function(x, y)
        results.append((matrix.detach(), *torch.autograd.grad(matrix.sin().sum(), (x, y))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMESAKES)
def test_values_and_gradients_are_the_oracles(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for size, width in ((1, 1), (5, 3), (40, 65)):
        a, b = torch.randn(size, width).to(dtype), torch.randn(size + 1, width).to(dtype)
        a[0] = 0.0
        results = []
        for function in (SIMILARITIES[name], NAMESAKES[name]):
            x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
            matrix = function(x, y)
            results.append((matrix.detach(), *torch.autograd.grad(matrix.sin().sum(), (x, y))))
        for found, expected in zip(*results, strict=True):
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_vectors_and_lists_count_as_rows(name: str) -> None:
    vector, rows = [0.5, 2.0], [[1.0, 0.0], [3.0, 4.0]]
    found = SIMILARITIES[name](vector, rows)  # type: ignore[arg-type]
    assert found.shape == (1, 2)
    torch.testing.assert_close(found, SIMILARITIES[name](torch.tensor([vector]), torch.tensor(rows)))


def test_up_raises_narrow_floats_alone() -> None:
    expected = {
        torch.float16: torch.float32,
        torch.bfloat16: torch.float32,
        torch.float8_e4m3fn: torch.float32,
        torch.float32: torch.float32,
        torch.float64: torch.float64,
        torch.int8: torch.int8,
        torch.bool: torch.bool,
    }
    for dtype, raised in expected.items():
        assert up(torch.zeros(2).to(dtype)).dtype == raised


@pytest.mark.parametrize("name", NAMESAKES)
def test_every_way_to_name_a_stock_similarity(name: str) -> None:
    member = oracle.SimilarityFunction(name)
    model = Model()
    model.similarity_fn_name = name
    for form in (name, SIMILARITIES[name], NAMESAKES[name], member, model.similarity):
        assert recognise(form) == name
    model.similarity_fn_name = member
    assert recognise(model.similarity) == name


def test_the_old_name_of_cosine() -> None:
    assert recognise(oracle.pytorch_cos_sim) == "cosine"


def test_a_namesake_from_elsewhere_is_not_taken_for_the_stock_one() -> None:
    def cos_sim(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.T - 1

    assert recognise(cos_sim) is cos_sim
    assert recognise(oracle.pairwise_cos_sim) is oracle.pairwise_cos_sim
    partial = functools.partial(ours.cos_sim)
    assert recognise(partial) is partial
    module = nn.CosineSimilarity()
    assert recognise(module) is module
    model = Model()
    assert recognise(model.similarity_pairwise) == model.similarity_pairwise
    model.similarity_fn_name = "maxsim"
    assert recognise(model.similarity) == model.similarity


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_is_asked_past_a_replaced_query(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of other libraries put torch's query of autocast back to its older signature, without a device."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda: enabled)
    a = torch.randn(4, 8)
    with full_precision(a):
        assert (a @ a.T).dtype == torch.float32


@pytest.mark.parametrize("wrong", ["cosin", "", 3, None, torch.ones(2)])
def test_what_is_no_similarity_is_refused(wrong: object) -> None:
    with pytest.raises(InputError, match=r"similarity must be one of \['cosine', .* or a callable, got"):
        recognise(wrong)  # type: ignore[arg-type]


def test_rowwise_declares_and_returns_the_function() -> None:
    def angular(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.T

    assert not is_rowwise(angular)
    assert rowwise(angular) is angular
    assert is_rowwise(angular)
    assert is_rowwise("cosine")


class Metric:
    """An object with settings of its own."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b.T

    def get_config_dict(self) -> dict[str, object]:
        return {"power": 2, "name": "x"}


@pytest.mark.parametrize(
    "function",
    [
        oracle.cos_sim,
        oracle.manhattan_sim,
        nn.CosineSimilarity(),
        functools.partial(oracle.cos_sim),
        functools.partial(Metric(), b=3, mode="x"),
        Metric(),
        Model().similarity,
    ],
    ids=lambda f: type(f).__name__,
)
def test_names_in_configurations_are_the_oracles(function: object) -> None:
    assert similarity_fct_name(function) == oracle.similarity_fct_name(function)  # type: ignore[arg-type]


def test_names_of_our_own_are_those_of_the_namesakes() -> None:
    for name, function in NAMESAKES.items():
        assert similarity_fct_name(function) == similarity_fct_name(name) == NAMESAKES[name].__name__


def test_recognising_does_not_import_sentence_transformers() -> None:
    code = (
        "import sys; from tileloss.similarity import recognise, cos_sim; recognise(cos_sim); recognise(print)\n"
        "sys.exit('sentence_transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
