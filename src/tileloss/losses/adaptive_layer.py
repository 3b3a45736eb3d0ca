"""A loss at several layers of a transformer, so that its last layers may be left out after training."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tileloss.errors import InputError, KindError
from tileloss.losses import citations
from tileloss.losses.columns import Features, separate_columns
from tileloss.losses.wrapping import as_number, replaced, uses_gradient_cache

WEIGHTINGS: dict[str, Callable[[int], float]] = {
    "uniform": lambda layer: 1.0,
    "log": lambda layer: 1.0 / (1.0 + math.log(1 + layer)),
    "linear": lambda layer: 1.0 / (1 + layer),
}


class AdaptiveLayerLoss(nn.Module):
    """Another loss on the embeddings of the last layer and on those that earlier layers would give.

    Drop-in for sentence-transformers' class of this name: the same arguments, values and gradients, around any loss of
    tileloss or of sentence-transformers that has no gradient cache. With w_i the weight of prior layer i, of which n
    are drawn, it is

        last_layer_weight * loss + prior_layers_weight / n * sum_i w_i loss_i
            + kl_div_weight * kl_temperature * sum_i KL(softmax(E / kl_temperature) || softmax(E_i / kl_temperature)),

    with E the embeddings of the last layer as a constant, E_i those of layer i, and the divergence the mean over all
    texts of the batch. The transformer runs once: the modules behind it run again for each layer on its hidden states.

    Time and memory are those of the inner loss for each layer, and the hidden states of all layers.

    Args:
        model: a SentenceTransformer whose first module is a Transformer; compiled or distributed ones are unwrapped.
        loss: the inner loss, around the same model. It must return a tensor, not a dict of losses.
        n_layers_per_step: how many prior layers, drawn at random by Python's `random`, a step trains; all, if not
            positive. Layer 0 is the output of the token embeddings.
        last_layer_weight: what the loss of the last layer is multiplied by.
        prior_layers_weight: what the mean loss of the prior layers is multiplied by.
        kl_div_weight: what the divergence is multiplied by.
        kl_temperature: what embeddings are divided by before their softmax; the divergence is left out, if 0.
        layer_weighting: weights of the prior layers: "uniform", 1; "log", 1 / (1 + ln(1 + i)); "linear", 1 / (1 + i);
            or a function from i to a number.

    Raises:
        InputError (a ValueError): at construction, for a weighting that is none.
        KindError (a TypeError and AssertionError): at construction, for a model that does not begin with a
            Transformer; at the call, for one that cannot be unwrapped, or an inner loss that returns a dict.

    Warns:
        UserWarning: about an inner loss with a gradient cache, whose second pass would not see the prior layers.

    Source: Li et al. 2024 (arXiv 2402.14776); "uniform" also Zhuang et al. 2024 (2410.13230).

    >>> loss = AdaptiveLayerLoss(model, MultipleNegativesRankingLoss(model))  # doctest: +SKIP
    >>> loss([query_features, document_features], None).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        n_layers_per_step: int = 1,
        last_layer_weight: float = 1.0,
        prior_layers_weight: float = 1.0,
        kl_div_weight: float = 1.0,
        kl_temperature: float = 0.3,
        layer_weighting: str | Callable[[int], float] = "uniform",
    ) -> None:
        super().__init__()
        if not callable(layer_weighting) and layer_weighting not in WEIGHTINGS:
            raise InputError(
                f'layer_weighting must be "uniform", "log", "linear", or a callable, but got {layer_weighting!r}.'
            )
        _check_first_module(model)
        self.model = model
        self.loss = loss
        self.n_layers_per_step = n_layers_per_step
        self.last_layer_weight = last_layer_weight
        self.prior_layers_weight = prior_layers_weight
        self.kl_div_weight = kl_div_weight
        self.kl_temperature = kl_temperature
        self.layer_weighting = layer_weighting
        if uses_gradient_cache(loss):
            warnings.warn(
                f"AdaptiveLayerLoss is not compatible with {type(loss).__name__}: its second pass over the model, in "
                "the backward, would not see the prior layers.",
                stacklevel=2,
            )

    def get_layer_weight(self, layer_idx: int) -> float:
        """What the loss of a prior layer is multiplied by; layer 0 is the output of the token embeddings."""
        weighting = self.layer_weighting
        return (WEIGHTINGS[weighting] if isinstance(weighting, str) else weighting)(layer_idx)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss (0-dim) of one batch: what the inner loss takes."""
        columns = list(sentence_features)
        model = _unwrapped(self.model)
        layers, outputs = _Layers(model[0]), _Outputs(model.forward)
        with (
            separate_columns(),  # the hidden states of a column are found in its features again
            replaced(model[0], "forward", layers),
            replaced(model, "forward", outputs),
            replaced(self.model, "forward", _WrittenBack(self.model.forward, layers)),
        ):
            total = as_number(self.loss(columns, labels), self.loss, self) * self.last_layer_weight
            last = self._softened(outputs.take()) if self.kl_temperature > 0 else None
            chosen = self._chosen(layers.count - 1)
            for layer in chosen:
                layers.chosen = layer
                value = as_number(self.loss(columns, labels), self.loss, self)
                total = total + value * (self.get_layer_weight(layer) / len(chosen) * self.prior_layers_weight)
                embeddings = outputs.take()
                if last is not None:
                    total = total + self._divergence(embeddings, last)
        return total

    def _chosen(self, count: int) -> Sequence[int]:
        layers = range(count)
        return random.sample(layers, self.n_layers_per_step) if 0 < self.n_layers_per_step < count else layers

    def _softened(self, embeddings: Tensor) -> Tensor:
        # a constant: the last layer teaches the others, and learns nothing from them
        return F.softmax(embeddings / self.kl_temperature, dim=-1).detach()

    def _divergence(
        self,
        embeddings: Tensor,  # (rows, D)
        last: Tensor,  # (rows, D)
    ) -> Tensor:
        own = F.log_softmax(embeddings / self.kl_temperature, dim=-1)
        return F.kl_div(own, last, reduction="batchmean") * (self.kl_temperature * self.kl_div_weight)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        weighting = self.layer_weighting
        return {
            "loss": type(self.loss).__name__,
            "n_layers_per_step": self.n_layers_per_step,
            "last_layer_weight": self.last_layer_weight,
            "prior_layers_weight": self.prior_layers_weight,
            "kl_div_weight": self.kl_div_weight,
            "kl_temperature": self.kl_temperature,
            "layer_weighting": weighting if isinstance(weighting, str) else getattr(weighting, "__name__", "custom"),
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper that introduced training all layers and widths."""
        return citations.LI_2024


class _Layers:
    """A transformer's forward that leaves the hidden states of all its layers in the features that it is given, and
    with a layer chosen, takes that layer's from there instead of running."""

    def __init__(self, transformer: Any) -> None:
        self.forward, self.config = transformer.forward, transformer.auto_model.config
        self.chosen: int | None = None
        self.count = 0
        self.written: Features = {}

    def __call__(self, features: Features, *args: Any, **kwargs: Any) -> Features:
        if self.chosen is not None:
            return {**features, "token_embeddings": features["all_layer_embeddings"][self.chosen]}
        before = self.config.output_hidden_states
        self.config.output_hidden_states = True
        try:
            output = self.forward(features, *args, **kwargs)
        finally:
            self.config.output_hidden_states = before
        self.count = len(output["all_layer_embeddings"])
        self.written = output
        return output

    def take(self) -> Features:
        """What the transformer wrote since the last time: nothing, where it did not run."""
        taken, self.written = self.written, {}
        return taken


class _WrittenBack:
    """A forward after which the features hold what the transformer wrote, also where it was given a copy of them.

    DistributedDataParallel makes one where it is told a GPU to move them to, FullyShardedDataParallel always.
    """

    def __init__(self, forward: Callable[..., Features], layers: _Layers) -> None:
        self.forward, self.layers = forward, layers

    def __call__(self, features: Features, *args: Any, **kwargs: Any) -> Features:
        output = self.forward(features, *args, **kwargs)
        # not the output: there accelerate has float32 copies of 16-bit hidden states, which would live on
        features.update(self.layers.take())
        return output


class _Outputs:
    """A model's forward that keeps the embeddings that it gives."""

    def __init__(self, forward: Callable[..., Features]) -> None:
        self.forward = forward
        self.embeddings: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Features:
        output = self.forward(*args, **kwargs)
        self.embeddings.append(output["sentence_embedding"])
        return output

    def take(self) -> Tensor:  # (rows of all columns, D)
        """What was kept since the last time."""
        taken, self.embeddings = self.embeddings, []
        return torch.cat(taken)


def _check_first_module(model: nn.Module) -> None:
    first = _unwrapped(model)[0]
    if not _is_a(first, "Transformer"):
        raise KindError(
            "AdaptiveLayerLoss needs a SentenceTransformer whose first module is a Transformer, to find the hidden "
            f"states of its layers; the first module is a {type(first).__name__}."
        )


def _unwrapped(model: Any) -> Any:
    """The SentenceTransformer inside what torch.compile or DistributedDataParallel made of it.

    Raises:
        KindError (a TypeError): when there is none.
    """
    inner = model
    while not _is_a(inner, "BaseModel"):
        wrapper = next((name for name in ("_orig_mod", "module") if hasattr(inner, name)), None)
        if wrapper is None:
            raise KindError(
                f"AdaptiveLayerLoss could not unwrap {type(model).__name__} to a BaseModel "
                f"(stopped at {type(inner).__name__}). "
                "Expected a SentenceTransformer, or what DistributedDataParallel or torch.compile made of one."
            )
        inner = getattr(inner, wrapper)
    return inner


def _is_a(module: nn.Module, name: str) -> bool:
    """Whether sentence-transformers' class of this name is among the module's, told without importing it."""
    package = "sentence_transformers"
    return any(kind.__name__ == name and kind.__module__.startswith(package) for kind in type(module).__mro__)
