"""The public differentiable functions, one file per primitive."""

from tileloss.functional.contrastive import ContrastiveStats, contrastive_loss, contrastive_loss_with_stats

__all__ = ["ContrastiveStats", "contrastive_loss", "contrastive_loss_with_stats"]
