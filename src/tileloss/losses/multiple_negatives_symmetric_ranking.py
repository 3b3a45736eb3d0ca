"""In-batch ranking in both directions; kept for scripts that use the name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from typing_extensions import deprecated

from tileloss.losses.multiple_negatives_ranking import MultipleNegativesRankingLoss
from tileloss.similarity import cos_sim


@deprecated(
    "MultipleNegativesSymmetricRankingLoss is MultipleNegativesRankingLoss with "
    'directions=("query_to_doc", "doc_to_query") and partition_mode="per_direction"; use that.'
)
class MultipleNegativesSymmetricRankingLoss(MultipleNegativesRankingLoss):
    """The mean of ranking documents for a query and queries for a document: the loss of CLIP. Deprecated.

    It is `MultipleNegativesRankingLoss` with both directions and a softmax for each, and says so when it is made.
    Columns of hard negatives count as candidates of a query, not the other way round. Arguments, errors and cost are
    those of the parent; the shared blocks of the two directions cost four GEMMs.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float | Tensor = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool | str = False,
    ) -> None:
        super().__init__(
            model=model,
            scale=scale,
            similarity_fct=similarity_fct,
            gather_across_devices=gather_across_devices,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        )
