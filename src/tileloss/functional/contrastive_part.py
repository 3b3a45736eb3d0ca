"""The definition of the contrastive loss over a part of a batch, the rest of which other processes have."""

from __future__ import annotations

from torch import Tensor

from tileloss import reference
from tileloss.guide import Guide
from tileloss.spec import ContrastiveSpec
from tileloss.tiled.part import Part


def definition_of_part(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (C * B, D)
    scale: float | Tensor,
    spec: ContrastiveSpec,
    doc_ids: Tensor | None,  # (C * B,)
    mask: Tensor | None,  # none so far: it would have to be (W * B, C * W * B)
    guide: Guide | None,
    part: Part,
) -> tuple[Tensor, Tensor]:
    """Loss (0-dim) and statistics (3,) of these rows, over the gathered batch; differentiable any number of times.

    The backward exchanges gradients, so every process must run it. The loss is this part's share of the batch's mean,
    times the number of processes.
    """
    doc_ids = None if doc_ids is None else part.gathered(doc_ids)
    if guide is not None:
        guide = guide._replace(queries=part.gathered(guide.queries), docs=part.gathered(guide.docs))
    queries, docs = part.gathered_with_grad(queries), part.gathered_with_grad(docs)
    loss, seen = reference.contrastive_loss(queries, docs, scale, spec, doc_ids, mask, guide, part.rows)
    return loss * (part.count * part.processes / part.size), seen.statistics()
