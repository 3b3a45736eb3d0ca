"""Recognising the distances of pairs that losses have stock functions for, sentence-transformers' among them.

Its distance metrics are nameless functions kept in classes, so they are told by identity: a function whose module
holds it in a class of the same name as ours is the namesake of ours. A function that someone holds comes from a module
that is loaded, so nothing is imported for that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import Enum
from typing import Any

from torch import Tensor

DistanceFn = Callable[[Tensor, Tensor], Tensor]

# the names in both libraries' classes; spelled out, because the compiler of torch 2.11 cannot list what a class holds
_NAMES = ("EUCLIDEAN", "MANHATTAN", "COSINE", "COSINE_DISTANCE")


def stock_name(
    metric: Any,
    family: type[Enum],
) -> str:
    """The name that `family`, or sentence-transformers' class of the same name, has for a function; else nothing."""
    module = getattr(metric, "__module__", None) or ""
    owners = [family]
    if module.startswith("sentence_transformers.") and hasattr(sys.modules.get(module), family.__name__):
        owners.append(getattr(sys.modules[module], family.__name__))
    return next((name for owner in owners for name in _NAMES if getattr(owner, name, None) is metric), "")


def metric_name(metric: Any, family: type[Enum]) -> str:
    """How a loss' configuration names a distance: as a member of `family`, or by its `__name__`."""
    name = stock_name(metric, family)
    return f"{family.__name__}.{name}" if name else getattr(metric, "__name__", str(metric))
