"""The definition of every primitive: materialised, the shortest correct PyTorch, gradients from autograd."""

from tileloss.reference.contrastive import contrastive_loss

__all__ = ["contrastive_loss"]
