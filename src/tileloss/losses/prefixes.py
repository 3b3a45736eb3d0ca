"""Where MatryoshkaLoss meets the losses that compute all prefixes of their embeddings in one pass.

Such a loss has a method `at_prefixes`, which gives a block in which its calls are the weighted sum over prefixes, or
None where its settings leave no way but one call for each width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tileloss.errors import ShapeError
from tileloss.functional import paired_similarity, prefix_cosines
from tileloss.functional.contrastive import check_call, loss_and_seen
from tileloss.functional.matryoshka import matryoshka_and_seen
from tileloss.reference.contrastive import Seen
from tileloss.similarity import SimilarityFn, recognise

Prefixes = Mapping[int, float]  # width -> weight

# similarities that are the cosine, once rows are of length one
PRODUCTS = ("cosine", "torch_cosine", "dot")
# what may not have been replaced in a loss whose calls are to be one for all widths
_PARTS = ("forward", "compute_loss_from_embeddings", "calculate_loss")


def at_prefixes(loss: nn.Module, model: nn.Module, prefixes: Prefixes) -> AbstractContextManager[None] | None:
    """A block in which `loss` is the weighted sum over prefixes of the embeddings of `model`, from one pass.

    None where each width must be computed by itself: by losses that cannot, and by those of another library, or of a
    user, who may do more with embeddings than we know.
    """
    if type(loss).__module__.partition(".")[0] != "tileloss" or not hasattr(loss, "at_prefixes"):
        return None
    if loss.model is not model or any(part in vars(loss) for part in _PARTS):
        return None
    return loss.at_prefixes(prefixes)  # type: ignore[operator]


def in_batch_loss(
    prefixes: Prefixes | None,
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (M, D)
    similarity: str | SimilarityFn,
    **objective: Any,
) -> tuple[Tensor, Tensor | Seen]:
    """`loss_and_seen`, or the weighted sum of the losses over prefixes, with what was seen at the smallest."""
    if prefixes is None:
        return loss_and_seen(check_call(queries, docs, similarity=similarity, **objective))
    smallest = min(prefixes)
    if recognise(similarity) in PRODUCTS:
        check_width(max(prefixes), queries)
        loss, seen = matryoshka_and_seen(check_call(queries, docs, **objective), prefixes)
        return loss, seen[smallest]
    found = {
        dim: loss_and_seen(check_call(shrink(queries, dim), shrink(docs, dim), similarity=similarity, **objective))
        for dim in prefixes
    }
    return _weighted(prefixes, [loss for loss, _ in found.values()]), found[smallest][1]


def paired_loss(
    prefixes: Prefixes | None,
    first: Tensor,  # (B, D)
    second: Tensor,  # (B, D)
    similarity: str,
    loss: Callable[[Tensor], Tensor],  # (B,) -> 0-dim
) -> Tensor:
    """`loss` of the similarities of paired rows, or its weighted sum over their cosines at prefixes."""
    if prefixes is None:
        return loss(paired_similarity(first, second, similarity=similarity))
    check_width(max(prefixes), first)
    cosines = prefix_cosines(first, second, list(prefixes))
    return _weighted(prefixes, [loss(column) for column in cosines.unbind(1)])


def _weighted(prefixes: Prefixes, losses: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight * loss for weight, loss in zip(prefixes.values(), losses, strict=True)]).sum()


def shrink(
    embeddings: Tensor,  # (..., D)
    dim: int,
) -> Tensor:  # (..., dim)
    """The first `dim` numbers of each embedding, normalised in the dtype that they have."""
    check_width(dim, embeddings)
    return F.normalize(embeddings[..., :dim], dim=-1)


def check_width(
    dim: int,
    embeddings: Tensor,  # (..., D)
) -> None:
    """Refuse a prefix that is longer than the embeddings."""
    if dim > embeddings.shape[-1]:
        raise ShapeError(
            f"Dimension {dim} in matryoshka_dims cannot be greater than the model's embedding dimension: "
            f"{embeddings.shape[-1]}"
        )
