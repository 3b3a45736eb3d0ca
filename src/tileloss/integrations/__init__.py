"""tileloss inside other libraries: their names served by its losses, their objects rebuilt, their logs filled.

And what losses own saved, and kept the same in all processes.
Nothing here imports the other library before it is asked to.
"""

from tileloss.integrations.own_parameters import save_losses, synchronise_losses
from tileloss.integrations.rebuild import accelerate
from tileloss.integrations.sentence_transformers import patch_sentence_transformers, unpatch_sentence_transformers
from tileloss.integrations.stats import log_stats

__all__ = [
    "accelerate",
    "log_stats",
    "patch_sentence_transformers",
    "save_losses",
    "synchronise_losses",
    "unpatch_sentence_transformers",
]
