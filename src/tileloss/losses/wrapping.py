"""What losses around another loss have in common: attributes replaced for one call, and values that can be added."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tileloss.errors import KindError


@contextmanager
def replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Give this one module another attribute for the length of a block; afterwards all is as before, error or not."""
    own = vars(module)  # past the modules' own setters, which register or forward what they are given
    had, before = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if had:
            own[name] = before
        else:
            del own[name]


def uses_gradient_cache(loss: nn.Module) -> bool:
    """Whether the loss embeds its columns again in the backward pass, when nothing is replaced any more."""
    return getattr(loss, "uses_gradient_cache", False)


def as_number(value: Any, inner: nn.Module, outer: nn.Module) -> Tensor:
    """What `inner` returned, if that can be weighted and added up.

    Raises:
        KindError (a TypeError): for a dict of losses, or whatever else is no tensor.
    """
    if isinstance(value, Tensor):
        return value
    raise KindError(
        f"{type(outer).__name__} weighs and adds up the values of its loss, and {type(inner).__name__} returned a "
        f"{type(value).__name__} where a tensor was expected; a loss with several named parts cannot be wrapped."
    )
