"""The definition of every primitive: materialised, the shortest correct PyTorch, gradients from autograd."""

from tileloss.reference.contrastive import contrastive_loss
from tileloss.reference.matryoshka import matryoshka_contrastive_loss
from tileloss.reference.pairs import paired_measure
from tileloss.reference.pairwise import pairwise_matrix
from tileloss.reference.triplet_masks import triplet_masks

__all__ = ["contrastive_loss", "matryoshka_contrastive_loss", "paired_measure", "pairwise_matrix", "triplet_masks"]
