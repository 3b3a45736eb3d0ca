"""Guided in-batch negatives in batches larger than the model's activations allow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tileloss.errors import InputError, ShapeError
from tileloss.gradcache import GradCache, RandContext, backward_by_columns
from tileloss.losses.guided import Columns, GuidedLoss
from tileloss.losses.static_embeddings import reads_static_embeddings
from tileloss.minibatches import Features, check_mini_batch_num_tokens, mini_batch


class CachedGISTEmbedLoss(GuidedLoss, GradCache):
    """`GISTEmbedLoss` with a gradient cache, and with any number of columns of negatives.

    Drop-in for sentence-transformers' class of this name: the same arguments, columns, values and gradients. Model and
    guide embed `mini_batch_size` texts at a time without a graph; the loss and the gradients of all embeddings come
    from one call of `tileloss.functional.contrastive_loss` over the whole batch; the model, and not the guide, embeds
    again to take its gradients (see `tileloss.gradcache`). Nothing of batch x batch is stored, and nothing of
    mini-batch x batch x width, which sentence-transformers' form passes through.

    Columns are (anchor, positive[, negative_1, ..., negative_n]); labels are ignored.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), and has a `tokenizer`. Its inputs
            must have a row for each text: not one with static embeddings.
        guide: as in `GISTEmbedLoss`.
        temperature: as there.
        mini_batch_size: texts that are embedded at a time. The larger, the faster, and the more memory.
        mini_batch_num_tokens: if set, embed as many texts at a time as have this many tokens, padding not counted.
        show_progress_bar: show the progress of the embedding, by tqdm.
        margin_strategy: as there.
        margin: as there.
        contrast_anchors: as there.
        contrast_positives: as there.
        gather_across_devices: as there.

    Attributes:
        stats: the `ContrastiveStats` of the last call, detached. None before the first.

    Raises:
        InputError (a ValueError): at construction, for options that are none of these, a model with static embeddings,
            or models without tokenizers; at the call, for a `mini_batch_size` below 1, or tokens that cannot be
            counted.
        ShapeError (a ValueError): at the call, for fewer than two columns, or an empty batch.

    The loss that a call returns is a leaf tensor: call `backward()` on it or on what is computed from it.
    `torch.autograd.grad` finds no way from it to the parameters, and a second derivative does not exist.

    Source: Solatorio 2024 (arXiv 2402.16829), with the cache of Gao et al. 2021 (2101.06983).

    >>> loss = CachedGISTEmbedLoss(model, guide, mini_batch_size=64)  # doctest: +SKIP
    >>> loss([anchor_features, positive_features], None).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        temperature: float = 0.01,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        margin_strategy: str = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool | str = False,
    ) -> None:
        if reads_static_embeddings(model):
            raise InputError(
                "CachedGISTEmbedLoss is not compatible with a SentenceTransformer model based on a StaticEmbedding, "
                "whose inputs have no row for each text to cut mini-batches from. Use GISTEmbedLoss, which such a "
                "model leaves room enough for."
            )
        super().__init__(
            model,
            guide,
            temperature,
            margin_strategy,
            margin,
            contrast_anchors,
            contrast_positives,
            gather_across_devices,
        )
        check_mini_batch_num_tokens(mini_batch_num_tokens)
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss (0-dim) of one batch: a feature dict for each column, in the order anchor, positive, negatives."""
        columns = list(sentence_features)
        if len(columns) < 2:
            raise ShapeError(f"Expected at least 2 inputs, got {len(columns)}: an anchor and a positive column.")
        return self.forward_cached(columns, labels)

    def embed_minibatch(  # type: ignore[override]
        self,
        sentence_feature: Features,
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, Tensor | None, RandContext | None]:
        """As in `GradCache`, with the guide's embeddings (end - begin, G) between; None in the pass with gradients."""
        reps, state = super().embed_minibatch(sentence_feature, begin, end, with_grad, copy_random_state, random_state)
        if with_grad:
            return reps, None, state
        with torch.no_grad():
            # cut anew: the model has written its outputs into the mini-batch that it was given
            guide_features = self.guide_features(mini_batch(sentence_feature, begin, end))
            return reps, self.guide(guide_features)["sentence_embedding"], state

    def _beside(self, between: Sequence[tuple[tuple[Tensor, ...], ...]], labels: Tensor | None) -> list[list[Tensor]]:
        return [list(guide_reps) for (guide_reps,) in between]

    def calculate_loss(  # type: ignore[override]
        self,
        reps: Sequence[Sequence[Tensor]],  # of each column, of each mini-batch: (rows, D)
        reps_guided: Sequence[Sequence[Tensor]],  # the same by the guide: (rows, G)
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """The loss (0-dim) of the embeddings; `with_backward` also adds to their `.grad` and returns it detached."""
        if len(reps) != len(reps_guided):
            raise ShapeError(
                f"reps and reps_guided must have the same length, one entry for each column: got {len(reps)} and "
                f"{len(reps_guided)}."
            )
        guide_columns = [torch.cat(list(parts)) for parts in reps_guided]
        return backward_by_columns(lambda columns: self.loss_of_columns(columns, guide_columns), reps, with_backward)

    def calculate_loss_and_cache_gradients(  # type: ignore[override]
        self, reps: Sequence[Sequence[Tensor]], reps_guided: Sequence[Sequence[Tensor]]
    ) -> tuple[Tensor, list[list[Tensor]]]:
        """The loss (0-dim, a new leaf) and the gradient of each mini-batch's embeddings."""
        return super().calculate_loss_and_cache_gradients(reps, reps_guided)

    def _materialised(self, rows: Columns, candidates: Columns, first: int) -> Tensor:
        """As in `GuidedLoss`, a mini-batch of rows at a time, which the backward computes again."""
        anchors = rows.embeddings[0]
        size = len(anchors)
        total = anchors.new_zeros(())
        for begin in range(0, size, self.mini_batch_size):
            end = min(begin + self.mini_batch_size, size)
            part = checkpoint(self._definition, rows.rows(begin, end), candidates, first + begin, use_reentrant=False)
            total = total + part * ((end - begin) / size)
        return total

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        config = super().get_config_dict()
        return {
            "guide": config.pop("guide"),
            "temperature": config.pop("temperature"),
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
            **config,
        }
