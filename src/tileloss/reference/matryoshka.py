"""The in-batch softmax loss at several prefix widths as its definition reads: once for each width, added up.

An embedding that is trained to be cut off is compared by the cosine of prefixes: the loss at width d is that of the
first d numbers of every row. Everything that the other backends compute is measured against this file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tileloss.guide import Guide
from tileloss.reference.contrastive import Seen, contrastive_loss
from tileloss.spec import ContrastiveSpec


def matryoshka_contrastive_loss(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (M, D): row i < B is the positive of query i
    scale: float | Tensor,
    spec: ContrastiveSpec,
    doc_ids: Tensor | None,  # (M,)
    mask: Tensor | None,  # (B, M) boolean
    guide: Guide | None,
    dims: Sequence[int],
    weights: Sequence[float],
) -> tuple[Tensor, list[Seen]]:
    """The weighted sum of the losses (0-dim), and what the statistics of each width are made of.

    Differentiable any number of times. Time and memory: those of `contrastive_loss`, K times.
    """
    found = [contrastive_loss(queries[:, :d], docs[:, :d], scale, spec, doc_ids, mask, guide) for d in dims]
    loss = sum(weight * loss for weight, (loss, _) in zip(weights, found, strict=True))
    return torch.as_tensor(loss), [seen for _, seen in found]
