"""The sampler for labelled texts: pairs in every batch, nothing twice, one order per seed and epoch."""

from collections import Counter

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

from tileloss.errors import InputError
from tileloss.sampling import LabelGroupedSampler

# sizes that are odd, one, smaller than a chunk, and no multiple of one
SIZES = {3: 1, 10: 2, 11: 3, -5: 7, 2**40: 8, 6: 9, 7: 40, 8: 101}
LABELS = torch.cat([torch.full((size,), label) for label, size in SIZES.items()])
LABELS = LABELS[torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("batch_size", "per_label"), [(4, 2), (14, 4), (32, 8), (64, 32), (400, 8)])
def test_every_batch_has_at_least_two_of_each_of_its_labels(batch_size, per_label, drop_last):
    for seed in range(5):
        sampler = LabelGroupedSampler(LABELS, batch_size, per_label, seed)
        batches = list(BatchSampler(sampler, batch_size, drop_last))
        for batch in batches:
            counts = Counter(LABELS[batch].tolist())
            assert min(counts.values()) >= 2
            assert len(batch) == batch_size or not drop_last
        assert sum(map(len, batches)) == (len(sampler) // batch_size * batch_size if drop_last else len(sampler))


def test_an_epoch_uses_every_example_once_but_one_of_an_odd_label():
    sampler = LabelGroupedSampler(LABELS, 16, 8)
    drawn = list(sampler)
    assert len(drawn) == len(set(drawn)) == len(sampler) == len(LABELS) - sampler.left_out
    counts = Counter(LABELS[drawn].tolist())
    assert counts == {label: size // 2 * 2 for label, size in SIZES.items() if size > 1}
    assert sampler.left_out == sum(size % 2 for size in SIZES.values())


def test_what_one_epoch_leaves_out_others_use():
    sampler = LabelGroupedSampler(LABELS, 16, 8)
    drawn = set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        drawn |= set(sampler)
    assert len(drawn) == len(LABELS) - 1, "all but the label of a single example"


def test_texts_of_a_label_come_together_and_labels_are_spread_over_the_epoch():
    labels = torch.arange(2000) % 20
    batches = torch.tensor(list(LabelGroupedSampler(labels, 200, 8))).view(-1, 200)
    for batch in batches:
        counts = Counter(labels[batch].tolist())
        assert len(counts) == 20, "a label's chunks are nowhere absent for as long as a batch"
        assert max(counts.values()) <= 24


def test_a_small_label_lasts_as_long_as_a_large_one():
    labels = torch.tensor([0] * 32 + [1] * 320)
    for seed in range(5):
        batches = torch.tensor(list(LabelGroupedSampler(labels, 88, 4, seed))).view(4, 88)
        assert all(4 <= (labels[batch] == 0).sum() <= 12 for batch in batches)


def test_one_seed_and_epoch_is_one_order():
    first, second, other = (LabelGroupedSampler(LABELS, 16, 8, seed) for seed in (1, 1, 2))
    assert list(first) == list(first) == list(second)
    assert list(first) != list(other)
    second.set_epoch(1)
    assert list(second) != list(first)
    # neither draws from, nor depends on, the random numbers of the program
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert list(first) == list(LabelGroupedSampler(LABELS.tolist(), 16, 8, 1))
    assert torch.equal(torch.get_rng_state(), state)


def test_it_serves_a_data_loader():
    loader = DataLoader(LABELS.tolist(), batch_size=14, sampler=LabelGroupedSampler(LABELS, 14, 4))
    assert all(min(Counter(batch.tolist()).values()) >= 2 for batch in loader)


@pytest.mark.parametrize(
    ("labels", "batch_size", "per_label", "message"),
    [
        (LABELS, 16, 3, "even number from 2"),
        (LABELS, 16, 0, "even number from 2"),
        (LABELS, 15, 2, "even number from 4"),
        (LABELS, 2, 2, "even number from 4"),
        (LABELS, 16, 10, "Lower per_label"),
        (torch.tensor([1.0, 1.0, 2.0, 2.0]), 4, 2, "whole number"),
        (torch.ones(4, 2, dtype=torch.int64), 4, 2, r"shape \(4, 2\)"),
        ([0, 0, 1, 2], 4, 2, "two labels with two examples each.* got 1 such in 4 examples with 3"),
        ([1] * 8, 4, 2, "got 1 such"),
        (torch.tensor([], dtype=torch.int64), 4, 2, "got 0 such"),
    ],
)
def test_what_gives_no_such_batches_is_refused(labels, batch_size, per_label, message):
    with pytest.raises(InputError, match=message):
        LabelGroupedSampler(labels, batch_size, per_label)
