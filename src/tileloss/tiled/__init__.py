"""The primitives over row blocks: bounded memory on any device, gradients derived by hand."""

from tileloss.tiled.contrastive import Needs, Result, contrastive_loss
from tileloss.tiled.passes import Passes, Problem
from tileloss.tiled.tile import Tile

__all__ = ["Needs", "Passes", "Problem", "Result", "Tile", "contrastive_loss"]
