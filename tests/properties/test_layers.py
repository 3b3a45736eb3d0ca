"""Losses at several layers: the answer of their definition, and the sum over layers and widths that they stand for.

A transformer is whatever gives the hidden states of all its layers, so here it gives the embeddings that were drawn.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tileloss import losses

from .judge import SUBJECT, Call, assert_definition
from .strategies import DTYPES, SIZES, WIDTHS, matrices

COLUMNS = 2
SEED = 3  # of the layers and widths that a step draws
INNER: dict[str, Callable[[nn.Module], nn.Module]] = {
    "in-batch": losses.MultipleNegativesRankingLoss,
    "ranked": losses.CoSENTLoss,
}
WEIGHTINGS = {"uniform": lambda layer: 1.0, "linear": lambda layer: 1 / (layer + 1), "own": lambda layer: 2.0**layer}


class Transformer(nn.Module):
    """Known to the losses as sentence-transformers' class of this name."""

    __module__ = "sentence_transformers"

    def __init__(self) -> None:
        super().__init__()
        self.auto_model = nn.Module()
        self.auto_model.config = type("Config", (), {"output_hidden_states": False})()

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        features["token_embeddings"] = features["layers"][-1]
        if self.auto_model.config.output_hidden_states:
            features["all_layer_embeddings"] = features["layers"]
        return features


class Pooling(nn.Module):
    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {**features, "sentence_embedding": features["token_embeddings"]}


class BaseModel(nn.Sequential):
    """Known to the losses as sentence-transformers' class of this name."""

    __module__ = "sentence_transformers"

    def __init__(self, width: int) -> None:
        super().__init__(Transformer(), Pooling())
        self.width = width

    def get_embedding_dimension(self) -> int:
        return self.width


class Given(nn.Module):
    """A model whose features are the embeddings."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features


def labels(rows: int) -> Tensor:
    return (torch.arange(rows) % 4) / 4


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "n_layers_per_step": draw(st.sampled_from([-1, 1, 2, 7])),
        "last_layer_weight": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "prior_layers_weight": draw(st.sampled_from([0.0, 1.0, 3.0])),
        "kl_div_weight": draw(st.sampled_from([0.0, 1.0])),
        "kl_temperature": draw(st.sampled_from([0.0, 0.3, 2.0])),
        "layer_weighting": draw(st.sampled_from(sorted(WEIGHTINGS))),
    }


@st.composite
def widths_of(draw: st.DrawFn, width: int) -> dict[str, Any]:
    """For Matryoshka2dLoss alone: widths with their weights, and how many of them a step draws."""
    dims = draw(st.lists(st.integers(1, width), min_size=1, max_size=3, unique=True))
    weights = [draw(st.sampled_from([0.5, 1.0, 2.0])) for _ in dims]
    return {"matryoshka_dims": dims, "matryoshka_weights": weights, "n_dims_per_step": draw(st.integers(-1, 2))}


def loss_of(inner: str, width: int, settings: dict[str, Any], dims: dict[str, Any]) -> Callable[..., Tensor]:
    """The loss as a function of the layers of the first column and then of the second."""
    model = BaseModel(width)
    kind = losses.Matryoshka2dLoss if dims else losses.AdaptiveLayerLoss
    weighting = settings["layer_weighting"]
    settings = settings | {"layer_weighting": WEIGHTINGS["own"] if weighting == "own" else weighting}
    loss = kind(model, INNER[inner](model), **dims, **settings)

    def function(*layers: Tensor) -> Tensor:
        random.seed(SEED)
        size = len(layers) // COLUMNS
        columns = [{"layers": layers[:size]}, {"layers": layers[size:]}]
        value: Tensor = loss(columns, labels(len(layers[0])).to(layers[0].device))
        return value

    return function


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, dict[str, Any], dict[str, Any]]:
    """Rows, width, and the settings of AdaptiveLayerLoss, or with some for widths, of Matryoshka2dLoss."""
    width = draw(WIDTHS.filter(lambda width: width > 1))
    return draw(SIZES), width, draw(options()), draw(st.just({}) | widths_of(width))


@pytest.mark.parametrize("inner", INNER)
@given(st.data())
def test_the_definition(inner: str, data: st.DataObject) -> None:
    size, width, settings, dims = data.draw(cases())
    dtype, count = data.draw(DTYPES)[0], COLUMNS * data.draw(st.integers(2, 4))
    layers = [data.draw(matrices(size, width, dtype)) for _ in range(count)]
    function = loss_of(inner, width, settings, dims)
    assert_definition(Call(function, layers, settings | dims | {"loss": inner}, 20.0, range(1, width + 1)))


@pytest.mark.skipif(SUBJECT == "triton", reason="in float64, which has no kernels")
@pytest.mark.parametrize("inner", INNER)
@given(st.data())
def test_the_sum_over_layers_and_widths(inner: str, data: st.DataObject) -> None:
    size, width, settings, dims = data.draw(cases())
    count = data.draw(st.integers(2, 4))
    drawn = [data.draw(matrices(size, width, torch.float64)) for _ in range(COLUMNS * count)]
    layers = [x.detach().requires_grad_() for x in drawn]
    found = loss_of(inner, width, settings, dims)(*layers)
    expected = summed(inner, layers[:count], layers[count:], settings, dims)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    if found.isfinite():
        gradients = [torch.autograd.grad(x, layers, materialize_grads=True) for x in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-7)


def summed(
    inner: str, first: Sequence[Tensor], second: Sequence[Tensor], settings: dict[str, Any], dims: dict[str, Any]
) -> Tensor:
    """What the losses promise, layer by layer and width by width."""
    random.seed(SEED)
    loss = INNER[inner](Given())

    def at(layer: int) -> Tensor:
        columns, total = (first[layer], second[layer]), torch.zeros((), dtype=torch.float64)
        for dim, weight in drawn_widths(columns[0].shape[1], dims):
            features = [{"sentence_embedding": x[:, :dim]} for x in columns]
            total = total + weight * loss(features, labels(len(columns[0])))
        return total

    last, prior, temperature = len(first) - 1, len(first) - 1, settings["kl_temperature"]
    total = settings["last_layer_weight"] * at(last)
    chosen: Sequence[int] = range(prior)
    if 0 < settings["n_layers_per_step"] < prior:
        chosen = random.sample(chosen, settings["n_layers_per_step"])
    for layer in chosen:
        weight = settings["prior_layers_weight"] * WEIGHTINGS[settings["layer_weighting"]](layer) / len(chosen)
        total = total + weight * at(layer)
        if temperature > 0:
            teacher, student = (torch.cat([first[i], second[i]]) / temperature for i in (last, layer))
            teacher = teacher.detach().log_softmax(dim=1)
            divergence = (teacher.exp() * (teacher - student.log_softmax(dim=1))).sum() / len(student)
            total = total + settings["kl_div_weight"] * temperature * divergence
    return total


def drawn_widths(width: int, dims: dict[str, Any]) -> list[tuple[int, float]]:
    """The widths of a step with their weights, the largest first; the whole one where there are no others."""
    if not dims:
        return [(width, 1.0)]
    pairs = sorted(zip(dims["matryoshka_dims"], dims["matryoshka_weights"], strict=True), reverse=True)
    count = dims["n_dims_per_step"]
    return [pairs[i] for i in sorted(random.sample(range(len(pairs)), count))] if 0 < count < len(pairs) else pairs
