"""A loss at several layers of a transformer and several widths of the embeddings, so that both may be cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from tileloss.losses.adaptive_layer import AdaptiveLayerLoss
from tileloss.losses.matryoshka import MatryoshkaLoss


class Matryoshka2dLoss(AdaptiveLayerLoss):
    """`AdaptiveLayerLoss` around `MatryoshkaLoss` around another loss; one prior layer and one width a step.

    Drop-in for sentence-transformers' class of this name: the same arguments, values and gradients. Every layer of a
    step draws its widths anew. The divergence between layers is that of whole embeddings.

    Args:
        model, loss: as in `AdaptiveLayerLoss`.
        matryoshka_dims, matryoshka_weights, n_dims_per_step: as in `MatryoshkaLoss`; by default one width a step.
        n_layers_per_step: as in `AdaptiveLayerLoss`; by default one prior layer a step.
        last_layer_weight, prior_layers_weight, kl_div_weight: as there.
        kl_temperature, layer_weighting: as there.

    Raises, warns: as those two.

    Source: Li et al. 2024 (arXiv 2402.14776).

    >>> loss = Matryoshka2dLoss(model, MultipleNegativesRankingLoss(model), [768, 256, 64])  # doctest: +SKIP
    >>> loss([query_features, document_features], None).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        matryoshka_dims: Sequence[int],
        matryoshka_weights: Sequence[float] | None = None,
        n_layers_per_step: int = 1,
        n_dims_per_step: int = 1,
        last_layer_weight: float = 1.0,
        prior_layers_weight: float = 1.0,
        kl_div_weight: float = 1.0,
        kl_temperature: float = 0.3,
        layer_weighting: str | Callable[[int], float] = "uniform",
    ) -> None:
        super().__init__(
            model,
            MatryoshkaLoss(model, loss, matryoshka_dims, matryoshka_weights, n_dims_per_step),
            n_layers_per_step=n_layers_per_step,
            last_layer_weight=last_layer_weight,
            prior_layers_weight=prior_layers_weight,
            kl_div_weight=kl_div_weight,
            kl_temperature=kl_temperature,
            layer_weighting=layer_weighting,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """The settings of both, as a model card shows them; keys and values are sentence-transformers'."""
        return super().get_config_dict() | self.loss.get_config_dict()  # type: ignore[operator]
