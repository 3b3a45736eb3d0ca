"""The loss classes, under sentence-transformers' names, module names and signatures."""

from tileloss.losses.cached_multiple_negatives_ranking import CachedMultipleNegativesRankingLoss
from tileloss.losses.cached_multiple_negatives_symmetric_ranking import CachedMultipleNegativesSymmetricRankingLoss
from tileloss.losses.gist_embed import GISTEmbedLoss
from tileloss.losses.mega_batch_margin import MegaBatchMarginLoss
from tileloss.losses.multiple_negatives_ranking import MultipleNegativesRankingLoss
from tileloss.losses.multiple_negatives_symmetric_ranking import MultipleNegativesSymmetricRankingLoss

__all__ = [
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "GISTEmbedLoss",
    "MegaBatchMarginLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
]
