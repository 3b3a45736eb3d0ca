"""Batches for losses that mine triplets: whoever is drawn, at least one more of its label is drawn with it.

Problem: an anchor without another text of its label in the batch teaches nothing, and random batches over many labels
are full of those; the samplers of torch and of transformers know lengths and weights, not labels. Method: in every
epoch each label's examples are shuffled and cut into chunks of an even size, and the chunks of all labels are spread
evenly over the epoch. All chunks and the batch are even, so the end of a batch cuts a chunk into pairs at worst.
Trade-off: a label with an odd number of examples leaves out one of them, another in each epoch, and nothing is
repeated to make the labels equal: a batch holds labels in the proportions of the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from tileloss.errors import InputError


class LabelGroupedSampler(Sampler[int]):
    """Positions of examples in an order whose every batch has at least two of each label that is in it.

    For the `sampler` of a `DataLoader` of that batch size, with or without `drop_last`. Each example is drawn at most
    once in an epoch; one of every label that has an odd number of them is not.

    Args:
        labels: a whole number for each example, in the order of the data set.
        batch_size: examples in a batch of one process, an even number.
        per_label: examples of a label that are drawn together, an even number; a label that has fewer gives what it
            has. A batch then holds about `batch_size / per_label` labels, or more of each where there are not so many.
        seed: with the epoch, decides the order.

    Attributes:
        left_out: how many examples are not drawn in an epoch.

    Raises:
        InputError: for odd or too small sizes, labels that are no whole numbers, or fewer than two labels that have
            two examples.

    Time and memory are linear in the number of examples.

    >>> labels = [7, 9, 7, 9]
    >>> first, second, third, fourth = LabelGroupedSampler(labels, batch_size=4, per_label=2)
    >>> labels[first] == labels[second], labels[second] == labels[third]
    (True, False)
    """

    def __init__(self, labels: Sequence[int] | Tensor, batch_size: int, per_label: int = 8, seed: int = 0) -> None:
        check_layout(batch_size, per_label)
        values = torch.as_tensor(labels)
        if values.ndim != 1 or values.is_floating_point() or values.is_complex():
            raise InputError(
                f"Labels must be one whole number for each example, got {values.dtype} of shape {tuple(values.shape)}."
            )
        order = values.argsort(stable=True)
        sizes = values.unique(return_counts=True)[1]
        members = [positions for positions in order.split(sizes.tolist()) if len(positions) > 1]
        if len(members) < 2:
            raise InputError(
                f"Need at least two labels with two examples each to tell them apart, got {len(members)} such in "
                f"{len(values)} examples with {len(sizes)} different labels."
            )
        self.members = members
        self.per_label = per_label
        self.seed = seed
        self.epoch = 0
        self._size = sum(len(positions) // 2 * 2 for positions in members)
        self.left_out = len(values) - self._size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch for the next iteration; the same epoch gives the same order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        # a prime beyond any number of epochs: the epochs of one seed are not those of the next
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        chunks: list[tuple[float, list[int]]] = []
        for positions in self.members:
            shuffled = positions[torch.randperm(len(positions), generator=generator)]
            parts = shuffled[: len(positions) // 2 * 2].split(self.per_label)
            # equal steps from a start of the label's own: every stretch of the epoch holds its share of the label
            start = torch.rand((), generator=generator).item()
            chunks += [((number + start) / len(parts), part.tolist()) for number, part in enumerate(parts)]
        chunks.sort(key=lambda chunk: chunk[0])
        for _, part in chunks:
            yield from part


def check_layout(batch_size: int, per_label: int) -> None:
    """Raise an InputError unless batches of this size can be made of groups of this size."""
    if per_label < 2 or per_label % 2:
        raise InputError(f"per_label must be an even number from 2, so that no text is alone, got {per_label}.")
    if batch_size < 4 or batch_size % 2:
        raise InputError(
            f"Batches for labelled losses must be even and hold two labels of two texts at least, got {batch_size}. "
            "Set per_device_train_batch_size to an even number from 4."
        )
    if per_label * 2 > batch_size:
        raise InputError(
            f"A batch of {batch_size} holds no two labels of {per_label} texts. Lower per_label, or raise "
            "per_device_train_batch_size."
        )
