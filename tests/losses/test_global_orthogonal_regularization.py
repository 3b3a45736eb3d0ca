"""Global orthogonal regularization, class against class with sentence-transformers'."""

import copy
import functools
import itertools
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tileloss
from tileloss import similarity
from tileloss.errors import ColumnsError, InputError
from tileloss.losses import GlobalOrthogonalRegularizationLoss

oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
util = pytest.importorskip("sentence_transformers.util")

SHAPES = [(0, 3), (1, 3), (2, 1), (2, 65), (63, 3), (100, 65), (257, 65)]
WEIGHTS = [(1.0, 1.0), (0.3, 2.0), (None, 1.0), (1.0, 0), (0, 1)]


class Identity(nn.Module):
    """A model whose features are its embeddings already."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features


def column(size: int, width: int, dtype: torch.dtype = torch.double, seed: int = 0) -> Tensor:
    """Rows with a direction in common, so that no term is zero."""
    torch.manual_seed(seed)
    return (torch.randn(size, width) + torch.randn(width)).to(dtype)


def pair(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Our loss and the stock one."""
    return tuple(
        kind(Identity(), *args, **kwargs)
        for kind in (GlobalOrthogonalRegularizationLoss, oracle.GlobalOrthogonalRegularizationLoss)
    )


def values_and_gradients(loss: Any, embeddings: list[Tensor]) -> dict[str, Tensor]:
    """Each term, and its gradients."""
    leaves = [x.clone().requires_grad_() for x in embeddings]
    terms = loss([{"sentence_embedding": x} for x in leaves])
    found = {name: term.detach() for name, term in terms.items()}
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, leaves, retain_graph=True)
        found |= {f"{name} {place}": gradient for place, gradient in enumerate(gradients)}
    return found


def compare(both: tuple[Any, Any], embeddings: list[Tensor], tolerance: float = 1e-8) -> None:
    found, expected = (values_and_gradients(loss, embeddings) for loss in both)
    assert list(found) == list(expected)
    for name, b in expected.items():
        assert found[name].dtype == b.dtype
        assert (found[name] - b).double().norm() <= tolerance * b.double().norm() + 1e-12, name


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_float64_agrees_to_1e_8(weights: tuple[Any, Any], aggregation: str, backend: str) -> None:
    both = pair(util.cos_sim, *weights, aggregation)
    for size, width in SHAPES:
        compare(both, [column(size, width)])
    compare(both, [column(size, 33, seed=size) for size in (20, 100, 1)])


def test_float32_agrees_to_2e_4(backend: str) -> None:
    for size, width in SHAPES[3:]:
        compare(pair(), [column(size, width, torch.float32), column(size, width, torch.float32, 1)], 2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_embeddings(dtype: torch.dtype, backend: str) -> None:
    """Float32 terms, gradients in the embeddings' dtype, equal to the oracle's within that dtype's rounding."""
    compare(pair(), [column(size, 65, dtype) for size in (40, 100)], 3 * torch.finfo(dtype).eps)


def test_the_automatic_choice_agrees_at_any_size() -> None:
    for size, width in itertools.product((20, 300), (65, 400)):
        compare(pair(), [column(size, width)])


@pytest.mark.parametrize("name", ["cos_sim", "dot_score", "euclidean_sim", "manhattan_sim", "pytorch_cos_sim"])
def test_similarities_by_our_functions_and_by_theirs(name: str, backend: str) -> None:
    if backend == "tiled" and name in ("euclidean_sim", "manhattan_sim"):
        pytest.skip("distances are materialised")
    both = pair(getattr(util, name))
    compare(both, [column(size, 33) for size in (20, 60)])
    if hasattr(similarity, name):
        ours = GlobalOrthogonalRegularizationLoss(Identity(), getattr(similarity, name))
        compare((ours, both[1]), [column(size, 33) for size in (20, 60)])
        assert ours.get_config_dict() == both[1].get_config_dict()


def squashed(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T).tanh() + a[:, :1]


def test_a_similarity_of_the_users() -> None:
    with tileloss.use_backend("reference"):
        compare(pair(squashed), [column(20, 5)])


def test_spread_out_rows_cost_nothing(backend: str) -> None:
    for rows in (torch.eye(8), torch.cat([torch.eye(8), -torch.eye(8)])):
        found = values_and_gradients(GlobalOrthogonalRegularizationLoss(Identity()), [rows])
        assert found["gor_second_moment"] == 0.0
        assert not found["gor_second_moment 0"].any()


def test_zero_rows_and_strides(backend: str) -> None:
    for size in (9, 100):
        rows = column(size, 20)
        rows[3] = 0.0
        compare(pair(), [rows, rows.T.contiguous().T, rows[:1].expand(size, 20)])


def test_terms_of_one_column(backend: str) -> None:
    rows = column(60, 20)
    ours, theirs = (loss.compute_gor(rows) for loss in pair())
    assert isinstance(ours, tuple)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_what_the_oracle_refuses_is_refused() -> None:
    for options, message in (
        ({"mean_weight": None, "second_moment_weight": 0}, "At least one of mean_weight or second_moment_weight"),
        ({"aggregation": "max"}, "aggregation must be 'mean' or 'sum', got 'max'"),
    ):
        with pytest.raises(ValueError, match=message):
            oracle.GlobalOrthogonalRegularizationLoss(Identity(), **options)
        with pytest.raises(InputError, match=message):
            GlobalOrthogonalRegularizationLoss(Identity(), **options)
    ours, theirs = pair()
    with pytest.raises(ValueError, match="not enough values"):
        theirs.compute_loss_from_embeddings([])
    for call in (ours, ours.compute_loss_from_embeddings):
        with pytest.raises(ColumnsError, match="expects at least 1 input column"):
            call([])


@pytest.mark.parametrize("options", [(), (util.dot_score, 0.5, None, "sum")])
def test_settings_are_the_oracles(options: tuple[Any, ...]) -> None:
    loss, theirs = pair(*options)
    assert list(loss.get_config_dict().items()) == list(theirs.get_config_dict().items())
    assert re.search(r"@\w+\{(\S+),", loss.citation)[1] == re.search(r"@\w+\{(\S+),", theirs.citation)[1]  # type: ignore[index]
    for name in theirs.get_config_dict():
        assert getattr(loss, name) == getattr(theirs, name) or name == "similarity_fct"
    partial = GlobalOrthogonalRegularizationLoss(Identity(), functools.partial(squashed))
    assert partial.get_config_dict()["similarity_fct"] == "squashed"


def test_settings_are_read_at_the_call(backend: str) -> None:
    both = pair()
    for loss in both:
        loss.similarity_fct, loss.mean_weight, loss.aggregation = util.dot_score, 7.0, "sum"
    compare(both, [column(20, 5), column(30, 5)])


def test_labels_are_ignored_and_copies_compute_the_same() -> None:
    rows = column(20, 5)
    loss = GlobalOrthogonalRegularizationLoss(Identity(), mean_weight=3.0)
    expected = loss.compute_loss_from_embeddings([rows])
    assert loss.compute_loss_from_embeddings([rows], torch.zeros(3)) == expected
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert other.compute_loss_from_embeddings([rows]) == expected
