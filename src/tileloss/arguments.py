"""Settings as people pass them: what is no number, or no sequence, is refused before it fails somewhere inside."""

from __future__ import annotations

from typing import Any

from tileloss.errors import InputError, KindError


def number(
    value: Any,
    expected: str,  # the beginning of the message
) -> float:
    """A setting as a float.

    Raises:
        KindError (an InputError and a TypeError): for what is no number.
    """
    try:
        if isinstance(value, str | bytes):  # float would read them
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # the latter from tensors of several numbers
        raise KindError(f"{expected}, got {value!r}.") from None


def finite_number(value: Any, expected: str) -> float:
    """As `number`, without nan and infinity.

    Raises:
        KindError (an InputError and a TypeError): for what is no number.
        InputError: for nan and infinity.
    """
    found = number(value, expected)
    if found - found != 0.0:  # torch.compile cannot follow math.isfinite
        raise InputError(f"{expected}, got {value!r}.")
    return found


def items(
    value: Any,
    expected: str,  # the beginning of the message
) -> tuple[Any, ...]:
    """What a sequence holds.

    Raises:
        KindError (an InputError and a TypeError): for what is no sequence, a string included.
    """
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return tuple(value)
    except TypeError:
        raise KindError(f"{expected}, got {value!r}.") from None
