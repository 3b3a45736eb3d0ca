"""tileloss: the losses of sentence-transformers, computed tile by tile.

`tileloss.losses` holds the loss classes, `tileloss.functional` the differentiable functions beneath them and
`tileloss.backend` the choice of what runs them.

`patch_sentence_transformers` puts these losses behind sentence-transformers' own names, and `accelerate` rebuilds
losses that were made from its classes.
"""

from typing import TYPE_CHECKING, Any

from tileloss import backend, functional
from tileloss.backend import use_backend
from tileloss.guide import Guide
from tileloss.similarity import rowwise

if TYPE_CHECKING:
    from tileloss.integrations import accelerate, patch_sentence_transformers, unpatch_sentence_transformers

__version__ = "0.1.0"
__all__ = [
    "Guide",
    "accelerate",
    "backend",
    "functional",
    "patch_sentence_transformers",
    "rowwise",
    "unpatch_sentence_transformers",
    "use_backend",
]
_INTEGRATIONS = ("accelerate", "patch_sentence_transformers", "unpatch_sentence_transformers")


def __getattr__(name: str) -> Any:
    # loaded when asked for: most programs never do
    if name in _INTEGRATIONS:
        from tileloss import integrations

        return getattr(integrations, name)
    raise AttributeError(f"module 'tileloss' has no attribute {name!r}")
