"""The public differentiable functions, one file per primitive."""

from tileloss.functional.contrastive import ContrastiveStats, contrastive_loss, contrastive_loss_with_stats
from tileloss.functional.dispersion import Dispersion, dispersion
from tileloss.functional.hardest import HardestNegatives, hardest_negatives
from tileloss.functional.matryoshka import matryoshka_contrastive_loss, matryoshka_contrastive_loss_with_stats
from tileloss.functional.pair_classifier import pair_logits
from tileloss.functional.pairs import paired_distance, paired_similarity
from tileloss.functional.pairwise import pairwise_distance, pairwise_similarity
from tileloss.functional.prefix_cosines import prefix_cosines
from tileloss.functional.ranking import ranking_loss
from tileloss.functional.triplet import TripletStats, triplet_loss, triplet_loss_with_stats
from tileloss.functional.triplet_masks import TripletMasks, triplet_masks

__all__ = [
    "ContrastiveStats",
    "Dispersion",
    "HardestNegatives",
    "TripletMasks",
    "TripletStats",
    "contrastive_loss",
    "contrastive_loss_with_stats",
    "dispersion",
    "hardest_negatives",
    "matryoshka_contrastive_loss",
    "matryoshka_contrastive_loss_with_stats",
    "pair_logits",
    "paired_distance",
    "paired_similarity",
    "pairwise_distance",
    "pairwise_similarity",
    "prefix_cosines",
    "ranking_loss",
    "triplet_loss",
    "triplet_loss_with_stats",
    "triplet_masks",
]
