"""In-batch ranking in both directions with a gradient cache; kept for scripts that use the name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from typing_extensions import deprecated

from tileloss.losses.cached_multiple_negatives_ranking import CachedMultipleNegativesRankingLoss
from tileloss.similarity import cos_sim


@deprecated(
    "CachedMultipleNegativesSymmetricRankingLoss is CachedMultipleNegativesRankingLoss with "
    'directions=("query_to_doc", "doc_to_query") and partition_mode="per_direction"; use that.'
)
class CachedMultipleNegativesSymmetricRankingLoss(CachedMultipleNegativesRankingLoss):
    """The loss of CLIP, the mean of ranking documents for queries and queries for documents, cached. Deprecated.

    It is `CachedMultipleNegativesRankingLoss` with both directions and a softmax for each, and says so when it is
    made. Columns of hard negatives count as candidates of a query, not the other way round. Arguments, errors and cost
    are those of the parent.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float | Tensor = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool | str = False,
        show_progress_bar: bool = False,
    ) -> None:
        super().__init__(
            model=model,
            scale=scale,
            similarity_fct=similarity_fct,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            gather_across_devices=gather_across_devices,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
            show_progress_bar=show_progress_bar,
        )
