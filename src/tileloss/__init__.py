"""tileloss: the losses of sentence-transformers, computed tile by tile.

`tileloss.losses` holds the loss classes, `tileloss.functional` the differentiable functions beneath them and
`tileloss.backend` the choice of what runs them.
"""

from tileloss import backend, functional
from tileloss.backend import use_backend
from tileloss.guide import Guide
from tileloss.similarity import rowwise

__version__ = "0.1.0"
__all__ = ["Guide", "backend", "functional", "rowwise", "use_backend"]
