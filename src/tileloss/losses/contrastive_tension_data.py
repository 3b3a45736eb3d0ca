"""Batches for contrastive tension: pairs of a text with itself, and pairs with another."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, MutableSequence
from dataclasses import dataclass, field
from typing import Any

from tileloss.errors import InputError


@dataclass
class InputExample:
    """Texts with a label: what sentence-transformers' collators and `fit` read off an object of their own class.

    Attributes:
        guid: an id, for those who want one.
        texts: the texts of one row.
        label: their label.
    """

    guid: str = ""
    texts: list[str] = field(default_factory=list)
    label: int | float = 0


class ContrastiveTensionDataLoader:
    """Batches of pairs for `ContrastiveTensionLoss`, one in `pos_neg_ratio` of which is a text with itself.

    Drop-in for sentence-transformers' class of this name: with the same state of Python's `random`, the same batches.
    Every text stands in one pair of a pass, on both of its sides or with another text; what is left over at the end,
    too little for a batch, is left out.

    Args:
        sentences: a list of texts. Each pass shuffles it, in place.
        batch_size: pairs of a batch; a multiple of `pos_neg_ratio`.
        pos_neg_ratio: pairs of which one is of equal texts, with label 1; the others have label 0.

    Attributes:
        collate_fn: if set, makes of a list of examples what is yielded in its place; `fit` sets it.

    Raises:
        InputError (a ValueError): for a `batch_size` that is no multiple of `pos_neg_ratio`.

    Source: Carlsson et al. 2021 (https://openreview.net/forum?id=Ov_sMNau-PF).

    >>> (batch,) = ContrastiveTensionDataLoader([f"text {i}" for i in range(6)], batch_size=3, pos_neg_ratio=3)
    >>> [example.label for example in batch]
    [1, 0, 0]
    """

    def __init__(self, sentences: MutableSequence[str], batch_size: int, pos_neg_ratio: int = 8) -> None:
        if pos_neg_ratio < 1 or batch_size % pos_neg_ratio != 0:
            raise InputError(
                f"A batch_size of {batch_size} cannot hold one positive pair for every pos_neg_ratio of "
                f"{pos_neg_ratio} pairs: the batch size must be divisible by the ratio, a positive number."
            )
        self.sentences = sentences
        self.batch_size = batch_size
        self.pos_neg_ratio = pos_neg_ratio
        self.collate_fn: Callable[[list[InputExample]], Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        random.shuffle(self.sentences)
        sentences = iter(self.sentences)
        for _ in range(len(self)):
            batch = [self._pair(place % self.pos_neg_ratio == 0, sentences) for place in range(self.batch_size)]
            yield batch if self.collate_fn is None else self.collate_fn(batch)

    @staticmethod
    def _pair(equal: bool, sentences: Iterator[str]) -> InputExample:
        text = next(sentences)
        return InputExample(texts=[text, text if equal else next(sentences)], label=int(equal))

    def __len__(self) -> int:
        """The batches of a pass."""
        texts_of_a_batch = 2 * self.batch_size - self.batch_size // self.pos_neg_ratio
        return len(self.sentences) // texts_of_a_batch
