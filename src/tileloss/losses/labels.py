"""What losses ask of the labels of a batch, in one wording."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tileloss.errors import MissingError, ShapeError


def one_label_each(
    loss: object,
    labels: Any,
    rows: Tensor,  # (B, ...)
    meaning: str,
) -> Tensor:  # (B,)
    """The labels as a vector with one for each row; those of shape (B, 1) are flattened.

    Args:
        loss: whose class the messages name.
        meaning: what a label is.

    Raises:
        MissingError (an AttributeError): without labels.
        ShapeError (a ValueError): for labels that are not one for each row.
    """
    name, size = type(loss).__name__, len(rows)
    if labels is None:
        raise MissingError(f"{name} needs labels: {meaning} for each of the {size} examples.")
    if labels.numel() != size:
        raise ShapeError(
            f"{name} expects {size} labels (one per example), but got {labels.numel()} labels with shape "
            f"{tuple(labels.shape)}."
        )
    return labels.reshape(-1)
