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
    size = rows.shape[0]
    if labels is None:
        raise MissingError(f"{type(loss).__name__} needs labels: {meaning} for each of the {size} examples.")
    if labels.numel() != size:
        raise ShapeError(
            f"{type(loss).__name__} expects {size} labels (one per example), but got {labels.numel()} labels with "
            f"shape {tuple(labels.shape)}."
        )
    return labels.reshape(-1)
