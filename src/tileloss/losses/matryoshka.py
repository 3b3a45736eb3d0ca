"""A loss at several widths of the embeddings, so that they may be cut off after training."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from tileloss.errors import InputError
from tileloss.losses import citations
from tileloss.losses.columns import Features
from tileloss.losses.prefixes import at_prefixes, shrink
from tileloss.losses.wrapping import as_number, replaced, uses_gradient_cache

logger = logging.getLogger(__name__)


class MatryoshkaLoss(nn.Module):
    """The weighted sum of another loss over prefixes of the embeddings: the first d numbers of each, normalised.

    Drop-in for sentence-transformers' class of this name: the same arguments, values and gradients, around any loss of
    tileloss or of sentence-transformers, with a gradient cache or without. The model runs once for all widths.

    In-batch losses of tileloss, guided and cached ones too, `CoSENTLoss` and `CosineSimilarityLoss` are computed in
    one pass at all widths, because similarities of prefixes are partial sums of one and the same product: see
    `tileloss.functional.matryoshka_contrastive_loss` and `prefix_cosines` for the cost. Any other loss is called for
    each width, in as much time and memory: the model's forward is replaced for the length of a call, and hands out
    the same embeddings again, cut shorter each time; under a gradient cache it is those in `calculate_loss` that are
    cut. These are normalised in their own dtype, as sentence-transformers has it.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), and has `get_embedding_dimension()`.
            It is the model of the inner loss.
        loss: the inner loss. It must return a tensor, not a dict of losses.
        matryoshka_dims: the widths, such as [768, 512, 256, 128, 64]. Without the model's own among them, whole
            embeddings are not trained.
        matryoshka_weights: what the loss at each width is multiplied by; by default 1.
        n_dims_per_step: how many widths, drawn at random by Python's `random`, a step trains; all, if not positive.

    Attributes:
        matryoshka_dims, matryoshka_weights: tuples, the largest width first.
        uses_gradient_cache: whether the inner loss does.
        stats: those of the inner loss, where it has any: of its last call, at the smallest width of the step.

    Labels whose last axis is as wide as the model (embeddings of a teacher) are cut to each width too.

    Raises:
        InputError (a ValueError): at construction, for widths or weights that are none.
        ShapeError (a ValueError): at the call, for a width that the embeddings do not have.
        KindError (a TypeError): at the call, for an inner loss that returns a dict.

    Source: Kusupati et al. 2022 (arXiv 2205.13147).

    >>> loss = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), [768, 256, 64])  # doctest: +SKIP
    >>> loss([query_features, document_features], None).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        matryoshka_dims: Sequence[int],
        matryoshka_weights: Sequence[float] | None = None,
        n_dims_per_step: int = -1,
    ) -> None:
        super().__init__()
        weights = [1] * len(matryoshka_dims) if matryoshka_weights is None else matryoshka_weights
        _check_dims(matryoshka_dims, weights, model.get_embedding_dimension())  # type: ignore[operator]
        self.model = model
        self.loss = loss
        by_width = sorted(zip(matryoshka_dims, weights, strict=True), key=lambda pair: pair[0], reverse=True)
        self.matryoshka_dims, self.matryoshka_weights = zip(*by_width, strict=True)
        self.n_dims_per_step = n_dims_per_step
        self.uses_gradient_cache = uses_gradient_cache(loss)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss (0-dim) of one batch: what the inner loss takes."""
        columns, chosen = list(sentence_features), self._chosen()
        fused = at_prefixes(self.loss, self.model, _weights(chosen))
        if fused is not None:
            with fused:
                return self.loss(columns, labels)
        if self.uses_gradient_cache:
            loss: Any = getattr(self.loss, "_orig_mod", self.loss)  # what is in a compiled one is called
            with replaced(loss, "calculate_loss", _cutting(loss.calculate_loss, chosen)):
                return self.loss(columns, labels)
        widths = _Widths(self.model.forward)
        with replaced(self.model, "forward", widths):
            losses = []
            for dim, weight in chosen:
                widths.cut_to(dim)
                value = self.loss(columns, self._cut_labels(labels, dim))
                losses.append(weight * as_number(value, self.loss, self))
        return sum(losses[1:], losses[0])

    def _chosen(self) -> list[tuple[int, float]]:
        """Widths and weights of this step, the largest first."""
        pairs = list(zip(self.matryoshka_dims, self.matryoshka_weights, strict=True))
        if 0 < self.n_dims_per_step < len(pairs):
            return [pairs[index] for index in sorted(random.sample(range(len(pairs)), self.n_dims_per_step))]
        return pairs

    def _cut_labels(self, labels: Any, dim: int) -> Any:
        if not isinstance(labels, Tensor) or labels.ndim not in (2, 3):
            return labels
        width = self.model.get_embedding_dimension()  # type: ignore[operator]
        return labels[..., :dim] if labels.shape[-1] == width else labels

    @property
    def stats(self) -> Any:
        """The statistics of the inner loss's last call; None where it keeps none."""
        return getattr(self.loss, "stats", None)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        return {
            "loss": type(self.loss).__name__,
            "matryoshka_dims": self.matryoshka_dims,
            "matryoshka_weights": self.matryoshka_weights,
            "n_dims_per_step": self.n_dims_per_step,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper that introduced Matryoshka representations."""
        return citations.KUSUPATI_2024


class _Widths:
    """A model's forward that runs once for each of the loss's calls, and for every further width hands out its
    outputs again, in the order in which they came.

    It cuts what it has cut before, which is why widths must decrease. In float16 that decides which rows are lost: one
    of an infinite norm becomes zero, and zero over zero is nan at the width after.
    """

    def __init__(self, forward: Callable[..., Features]) -> None:
        self.forward = forward
        self.outputs: list[Features] = []
        self.dim = self.turn = 0

    def cut_to(self, dim: int) -> None:
        """Begin a call of the loss at this width."""
        self.dim, self.turn = dim, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Features:
        if self.turn == len(self.outputs):
            self.outputs.append(self.forward(*args, **kwargs))
        output = self.outputs[self.turn]
        output = {**output, "sentence_embedding": shrink(output["sentence_embedding"], self.dim)}
        self.outputs[self.turn] = output
        self.turn += 1
        return output


def _cutting(calculate_loss: Callable[..., Tensor], chosen: Sequence[tuple[int, float]]) -> Callable[..., Tensor]:
    """`calculate_loss` of a loss with a gradient cache, added up over widths of the embeddings that it is given."""

    def calculated(reps: Sequence[Sequence[Tensor]], *args: Any, **kwargs: Any) -> Tensor:
        losses = []
        for dim, weight in chosen:
            parts = [[shrink(part, dim) for part in column] for column in reps]
            if not torch.is_grad_enabled():
                losses.append(weight * calculate_loss(parts, *args, **kwargs))
                continue
            # the inner loss back-propagates by itself: to leaves, which leave the graph of the cutting whole
            leaves = [[part.detach().requires_grad_() for part in column] for column in parts]
            losses.append(weight * calculate_loss(leaves, *args, **kwargs))
            for part, leaf in zip(chain(*parts), chain(*leaves), strict=True):
                if leaf.grad is not None:
                    part.backward(weight * leaf.grad)
        return sum(losses[1:], losses[0])

    return calculated


def _weights(chosen: Sequence[tuple[int, float]]) -> dict[int, float]:
    """The weight of each width, of which one may have been given twice."""
    weights: dict[int, float] = {}
    for dim, weight in chosen:
        weights[dim] = weights.get(dim, 0) + weight
    return weights


def _check_dims(dims: Sequence[int], weights: Sequence[float], width: int | None) -> None:
    if not dims:
        raise InputError("You must provide at least one dimension in matryoshka_dims.")
    if any(dim <= 0 for dim in dims):
        raise InputError("All dimensions passed to a matryoshka loss must be > 0.")
    if len(weights) != len(dims):
        raise InputError("matryoshka_weights must be the same length as matryoshka_dims.")
    if width is None:
        return
    if any(dim > width for dim in dims):
        raise InputError(f"Dimensions in matryoshka_dims cannot exceed the model's embedding dimension of {width}.")
    if width not in dims:
        logger.warning(
            f"The model's embedding dimension {width} is not in matryoshka_dims: {list(dims)}. Whole embeddings are "
            f"then not trained, and may be worse than their prefixes; include {width}."
        )
