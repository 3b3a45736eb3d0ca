"""A loss of how scores rank what labels rank, over all pairs at once, without their matrix.

Written out it has a term for each two rows whose labels differ, B x B of them. Sorted by label, the terms of a row are
a tail of the batch, and a running sum gives all tails.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tileloss.backend import accepts_backend, choose
from tileloss.errors import DtypeError, ShapeError
from tileloss.functional.checks import check_labels, check_tensor
from tileloss.functional.ranking_op import sorted_loss
from tileloss.reference.ranking import ranking_loss as definition


@accepts_backend
def ranking_loss(
    scores: Tensor,  # (B,)
    labels: Tensor,  # (B,) or (B, 1)
    *,
    backend: str | None = None,
) -> Tensor:
    """log(1 + sum of exp(scores[k] - scores[i]) over all rows k, i with labels[k] < labels[i]).

    What is labelled higher should score higher; rows of equal labels are not compared. Without two labels that differ
    the loss is zero, with a gradient of zero.

    Args:
        scores: (B,) floating point, such as similarities of B pairs times a scale.
        labels: (B,) or (B, 1), any real numbers or booleans without nan, of which only the order counts.
        backend: "reference", "tiled", "triton" or "auto", for this call alone; see `tileloss.backend`. The latter two
            are one here: PyTorch's sorts and scans, on any device.

    Returns:
        A 0-dim tensor: float64 for float64 scores, else float32. Differentiable in the scores. A second derivative
        goes through the materialised definition: exact, in O(B^2) memory.

    Raises:
        ShapeError, DtypeError, DeviceError, InputError: for inputs that do not fit, before any work. Labels of nan are
            refused on a CPU; on other devices, which would have to be waited for, the result means nothing then.
        BackendError: for a backend that was asked for by name and cannot run.

    Cost:
        Time O(B log B), memory a dozen vectors of B numbers, or for few rows a matrix until the forward returns; the
        gradient comes with the loss. Sums are of the scores as they are, so that differences are as exact as the
        scores: far from zero, shift them.

    Source:
        Huang et al. 2024, CoSENT (doi 10.1109/TASLP.2024.3402087).

    >>> ranking_loss(torch.tensor([0.5, -0.5]), torch.tensor([0.0, 1.0]))  # log(1 + e)
    tensor(1.3133)
    """
    _check_scores(scores)
    labels = check_labels(labels, scores, "scores", "number", "which is above and below nothing: leave such rows out.")
    labels = labels.to(torch.uint8) if labels.dtype == torch.bool else labels  # booleans cannot be searched
    chosen = choose(scores).backend
    if chosen == "reference" or len(scores) == 0:  # without rows there is nothing to scan
        return definition(scores, labels)
    return sorted_loss(scores, labels)


def _check_scores(scores: Any) -> None:
    check_tensor("scores", scores)
    if scores.ndim != 1:
        raise ShapeError(f"scores must be a vector with a number for each row, got shape {tuple(scores.shape)}.")
    if not scores.is_floating_point():
        raise DtypeError(f"scores must hold floating-point numbers, got {scores.dtype}.")
