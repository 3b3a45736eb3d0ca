"""The deprecated symmetric loss against sentence-transformers' class of the same name."""

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tileloss.errors import InputError
from tileloss.losses import MultipleNegativesRankingLoss, MultipleNegativesSymmetricRankingLoss

oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
util = pytest.importorskip("sentence_transformers.util")


class Identity(nn.Module):
    """A model whose features are its embeddings already."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features


def make(kind: type, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return kind(Identity(), *args, **options)


def value_and_gradients(kind: type, embeddings: list[Tensor], scale: float, **options: Any) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in embeddings]
    temperature = torch.tensor(scale, dtype=embeddings[0].dtype, requires_grad=True)
    value = make(kind, scale=temperature, **options).compute_loss_from_embeddings(leaves, None)
    return [value.detach(), *torch.autograd.grad(value, [*leaves, temperature])]


@pytest.mark.parametrize("similarity", ["cos_sim", "dot_score", "euclidean_sim", "manhattan_sim"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-4)])
def test_values_and_gradients_are_the_oracles(
    dtype: torch.dtype, tolerance: float, similarity: str, backend: str
) -> None:
    """With hard negatives too, which count in the forward half alone."""
    torch.manual_seed(0)
    for size, negatives, width in ((1, 0, 3), (2, 1, 65), (33, 0, 3), (33, 4, 16)):
        embeddings = [torch.randn(size, width, dtype=dtype) for _ in range(2 + negatives)]
        options = {"similarity_fct": getattr(util, similarity)}
        found = value_and_gradients(MultipleNegativesSymmetricRankingLoss, embeddings, 2.0, **options)
        expected = value_and_gradients(oracle.MultipleNegativesSymmetricRankingLoss, embeddings, 2.0, **options)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= tolerance * (b.norm() + 1e-3), (size, negatives, width)


def test_making_one_is_deprecated_and_says_what_to_use() -> None:
    with pytest.warns(DeprecationWarning, match=r'directions=\("query_to_doc", "doc_to_query"\)'):
        MultipleNegativesSymmetricRankingLoss(Identity())


def test_it_is_the_ranking_loss_with_both_directions(backend: str) -> None:
    loss = make(MultipleNegativesSymmetricRankingLoss, scale=5.0)
    assert isinstance(loss, MultipleNegativesRankingLoss)
    spelled_out = MultipleNegativesRankingLoss(
        Identity(), scale=5.0, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    assert loss.get_config_dict() == spelled_out.get_config_dict()
    assert loss.citation == spelled_out.citation
    embeddings = [torch.randn(9, 4) for _ in range(3)]
    assert torch.equal(
        loss.compute_loss_from_embeddings(embeddings), spelled_out.compute_loss_from_embeddings(embeddings)
    )


def test_settings_are_the_oracles() -> None:
    ours, theirs = (
        make(kind, 7.0, util.dot_score, False)
        for kind in (MultipleNegativesSymmetricRankingLoss, oracle.MultipleNegativesSymmetricRankingLoss)
    )
    assert ours.get_config_dict() == theirs.get_config_dict()
    assert ours.temperature == theirs.temperature
    assert "günther2024" in ours.citation
    assert "günther2024" in theirs.citation


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "MultipleNegativesSymmetricRankingLoss"])
def test_signatures_begin_with_the_oracles(name: str) -> None:
    import tileloss.losses

    ours, theirs = (
        [(p.name, p.kind, getattr(p.default, "__name__", p.default)) for p in parameters]
        for parameters in (
            inspect.signature(getattr(package, name).__init__).parameters.values()
            for package in (tileloss.losses, oracle)
        )
    )
    assert ours[: len(theirs)] == theirs
    assert all(kind == inspect.Parameter.KEYWORD_ONLY for _, kind, _ in ours[len(theirs) :])


def test_it_takes_no_hardness() -> None:
    with pytest.raises(TypeError):
        make(MultipleNegativesSymmetricRankingLoss, hardness_mode="all_negatives")
    with pytest.raises(InputError, match=r"Scale must be a positive value\."):
        make(MultipleNegativesSymmetricRankingLoss, scale=0.0)
