"""tileloss inside other libraries: their names served by its losses, their objects rebuilt, their logs filled.

And their processes kept together, in what losses own.
Nothing here imports the other library before it is asked to.
"""

from tileloss.integrations.rebuild import accelerate
from tileloss.integrations.sentence_transformers import patch_sentence_transformers, unpatch_sentence_transformers
from tileloss.integrations.stats import log_stats
from tileloss.integrations.synchronise import synchronise_losses

__all__ = [
    "accelerate",
    "log_stats",
    "patch_sentence_transformers",
    "synchronise_losses",
    "unpatch_sentence_transformers",
]
