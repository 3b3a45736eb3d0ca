"""The loss classes, under sentence-transformers' names, module names and signatures."""

from tileloss.losses.adaptive_layer import AdaptiveLayerLoss
from tileloss.losses.angle import AnglELoss
from tileloss.losses.batch_all_triplet import BatchAllTripletLoss
from tileloss.losses.batch_hard_soft_margin_triplet import BatchHardSoftMarginTripletLoss
from tileloss.losses.batch_hard_triplet import BatchHardTripletLoss, BatchHardTripletLossDistanceFunction
from tileloss.losses.batch_semi_hard_triplet import BatchSemiHardTripletLoss
from tileloss.losses.cached_gist_embed import CachedGISTEmbedLoss
from tileloss.losses.cached_multiple_negatives_ranking import CachedMultipleNegativesRankingLoss
from tileloss.losses.cached_multiple_negatives_symmetric_ranking import CachedMultipleNegativesSymmetricRankingLoss
from tileloss.losses.contrastive import ContrastiveLoss, SiameseDistanceMetric
from tileloss.losses.contrastive_tension import (
    ContrastiveTensionDataLoader,
    ContrastiveTensionLoss,
    ContrastiveTensionLossInBatchNegatives,
)
from tileloss.losses.cosent import CoSENTLoss
from tileloss.losses.cosine_similarity import CosineSimilarityLoss
from tileloss.losses.denoising_auto_encoder import DenoisingAutoEncoderLoss
from tileloss.losses.distill_kl_div import DistillKLDivLoss
from tileloss.losses.embed_distill import EmbedDistillLoss
from tileloss.losses.gist_embed import GISTEmbedLoss
from tileloss.losses.global_orthogonal_regularization import GlobalOrthogonalRegularizationLoss
from tileloss.losses.margin_mse import MarginMSELoss
from tileloss.losses.matryoshka import MatryoshkaLoss
from tileloss.losses.matryoshka_2d import Matryoshka2dLoss
from tileloss.losses.mega_batch_margin import MegaBatchMarginLoss
from tileloss.losses.mse import MSELoss
from tileloss.losses.multiple_negatives_ranking import MultipleNegativesRankingLoss
from tileloss.losses.multiple_negatives_symmetric_ranking import MultipleNegativesSymmetricRankingLoss
from tileloss.losses.online_contrastive import OnlineContrastiveLoss
from tileloss.losses.softmax import SoftmaxLoss
from tileloss.losses.triplet import TripletDistanceMetric, TripletLoss

__all__ = [
    "AdaptiveLayerLoss",
    "AnglELoss",
    "BatchAllTripletLoss",
    "BatchHardSoftMarginTripletLoss",
    "BatchHardTripletLoss",
    "BatchHardTripletLossDistanceFunction",
    "BatchSemiHardTripletLoss",
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "CoSENTLoss",
    "ContrastiveLoss",
    "ContrastiveTensionDataLoader",
    "ContrastiveTensionLoss",
    "ContrastiveTensionLossInBatchNegatives",
    "CosineSimilarityLoss",
    "DenoisingAutoEncoderLoss",
    "DistillKLDivLoss",
    "EmbedDistillLoss",
    "GISTEmbedLoss",
    "GlobalOrthogonalRegularizationLoss",
    "MSELoss",
    "MarginMSELoss",
    "Matryoshka2dLoss",
    "MatryoshkaLoss",
    "MegaBatchMarginLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
    "OnlineContrastiveLoss",
    "SiameseDistanceMetric",
    "SoftmaxLoss",
    "TripletDistanceMetric",
    "TripletLoss",
]
