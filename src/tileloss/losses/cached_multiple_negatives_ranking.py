"""Ranking with in-batch negatives in batches larger than the model's activations allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from tileloss.errors import InputError, ShapeError
from tileloss.functional import ContrastiveStats
from tileloss.gradcache import GradCache, backward_by_columns
from tileloss.gradcache import RandContext as RandContext  # others' losses import it from here
from tileloss.losses import citations
from tileloss.losses.multiple_negatives_ranking import MultipleNegativesRankingLoss
from tileloss.losses.prefixes import Prefixes
from tileloss.losses.static_embeddings import reads_static_embeddings
from tileloss.minibatches import Features, check_mini_batch_num_tokens
from tileloss.similarity import cos_sim


def _setting(name: str, of: str) -> property:
    return property(lambda self: getattr(self.loss, name), doc=of)


class CachedMultipleNegativesRankingLoss(GradCache):
    """`MultipleNegativesRankingLoss` with a gradient cache: the batch is limited by its embeddings, not activations.

    Drop-in for sentence-transformers' class of this name. Value and gradients are those of the loss without a cache;
    the model runs forward twice and backward once, on `mini_batch_size` rows at a time (see `tileloss.gradcache`).

    The stage between the two passes is one call of `tileloss.functional.contrastive_loss` over the whole batch. That
    finds the gradients of the embeddings with the loss, holds neither a graph nor a matrix of batch by batch, and so
    needs no mini-batches of its own: `mini_batch_size` is a matter of the model alone. Cutting that stage as well, the
    usual form normalises all documents once for every mini-batch, and launches about a hundred small operations each
    time; at a batch of 65,536 in mini-batches of 32, that is 2,048 times.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer. Its
            inputs must have a row for each text: not one with static embeddings.
        scale: as in `MultipleNegativesRankingLoss`; a tensor must be a leaf, such as a parameter.
        similarity_fct: as there.
        mini_batch_size: texts that are embedded at a time. The larger, the faster, and the more memory.
        mini_batch_num_tokens: if set, embed as many texts at a time as have this many tokens, padding not counted.
        gather_across_devices: as there.
        directions: as there.
        partition_mode: as there.
        show_progress_bar: show the progress of the embedding, by tqdm.
        hardness_mode: as there.
        hardness_strength: as there.
        exclude_same_label: as there.

    Attributes:
        loss: the `MultipleNegativesRankingLoss` that owns the settings; setting them here sets them there.
        stats: the `ContrastiveStats` of the last call. None before the first.

    Raises:
        InputError (a ValueError): at construction, for options that are none of these, or a model with static
            embeddings; at the call, for a `mini_batch_size` below 1, or tokens that cannot be counted.
        ShapeError: at the call, for fewer than two columns, or an empty batch.

    The loss that a call returns is a leaf tensor: call `backward()` on it or on what is computed from it.
    `torch.autograd.grad` finds no way from it to the parameters, and a second derivative does not exist.

    Source: Gao et al. 2021 (arXiv 2101.06983).

    >>> loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=64)  # doctest: +SKIP
    >>> loss([query_features, document_features], None).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float | Tensor = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool | str = False,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        show_progress_bar: bool = False,
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        exclude_same_label: bool = False,
    ) -> None:
        super().__init__()
        if reads_static_embeddings(model):
            raise InputError(
                "CachedMultipleNegativesRankingLoss is not compatible with a SentenceTransformer model based on a "
                "StaticEmbedding, whose inputs have no row for each text to cut mini-batches from. Use "
                "MultipleNegativesRankingLoss, which such a model leaves room enough for."
            )
        check_mini_batch_num_tokens(mini_batch_num_tokens)
        self.model = model
        self.loss = MultipleNegativesRankingLoss(
            model,
            scale=scale,
            similarity_fct=similarity_fct,
            gather_across_devices=gather_across_devices,
            directions=directions,
            partition_mode=partition_mode,
            hardness_mode=hardness_mode,
            hardness_strength=hardness_strength,
            exclude_same_label=exclude_same_label,
        )
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    scale = _setting("scale", "what similarities are multiplied by.")
    similarity_fct = _setting("similarity_fct", "the similarity.")
    gather_across_devices = _setting("gather_across_devices", "whether candidates are shared between processes.")
    directions = _setting("directions", "what a query's row of candidates holds.")
    partition_mode = _setting("partition_mode", "one softmax over all directions, or one for each.")
    hardness_mode = _setting("hardness_mode", "which negatives weigh more the more similar they are.")
    hardness_strength = _setting("hardness_strength", "how much more they weigh.")
    exclude_same_label = _setting("exclude_same_label", "whether labels are ids of texts that are no negatives.")

    def __setattr__(self, name: str, value: Any) -> None:
        # ahead of nn.Module's own, which would register a parameter or module under the name, unseen by the loss
        if isinstance(getattr(type(self), name, None), property):
            setattr(self.loss, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss (0-dim) of one batch: a feature dict for each column, in the order query, positive, negatives."""
        columns = list(sentence_features)
        if len(columns) < 2:
            raise ShapeError(f"Expected at least 2 inputs, got {len(columns)}: a query and a positive column.")
        if isinstance(self.scale, Tensor) and not self.scale.is_leaf:
            raise InputError(
                "A tensor scale must be a leaf here: loss and model are differentiated at different times, and what "
                "the scale was computed from would get its gradient at the wrong one. Train the scale itself."
            )
        return self.forward_cached(columns, labels)

    def calculate_loss(
        self,
        reps: Sequence[Sequence[Tensor]],  # of each column, of each mini-batch: (rows, D)
        labels: Tensor | None = None,
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """The loss (0-dim) of the embeddings; `with_backward` also adds to their `.grad` and returns it detached."""
        return backward_by_columns(
            lambda columns: self.loss.compute_loss_from_embeddings(columns, labels), reps, with_backward
        )

    def at_prefixes(self, prefixes: Prefixes) -> AbstractContextManager[None] | None:
        """A block in which a call is the weighted sum over widths; see `tileloss.losses.prefixes`."""
        return self.loss.at_prefixes(prefixes)

    def _own_tensors(self) -> list[Tensor]:
        own = super()._own_tensors()
        if isinstance(self.scale, Tensor) and self.scale.requires_grad and all(self.scale is not x for x in own):
            own.append(self.scale)  # trained, though it is no parameter
        return own

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        config = self.loss.get_config_dict()
        return {
            "scale": config.pop("scale"),
            "similarity_fct": config.pop("similarity_fct"),
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
            **config,
        }

    @property
    def stats(self) -> ContrastiveStats | None:
        """What the loss saw on its way, at the last call."""
        return self.loss.stats

    @property
    def temperature(self) -> float | Tensor:
        """1 / scale."""
        return self.loss.temperature

    @property
    def citation(self) -> str:
        """BibTeX of the paper that introduced the gradient cache."""
        return citations.GAO_2021
