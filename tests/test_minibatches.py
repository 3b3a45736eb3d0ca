"""Mini-batches of feature dicts: the ranges, and what each kind of entry becomes, as sentence-transformers has it."""

from typing import Any

import pytest
import torch

from tileloss.errors import InputError, ShapeError
from tileloss.minibatches import mini_batch, mini_batch_ranges, row_count

oracle = pytest.importorskip("sentence_transformers.base.losses.gradcache")


def padded(lengths: list[int], left: bool = False) -> dict[str, Any]:
    width = max(lengths)
    mask = torch.tensor([[0] * (width - n) + [1] * n if left else [1] * n + [0] * (width - n) for n in lengths])
    ids = torch.arange(len(lengths) * width).view(len(lengths), width)
    return {"input_ids": ids, "attention_mask": mask, "modality": "text"}


def flattened(lengths: list[int]) -> dict[str, Any]:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        "input_ids": torch.arange(sum(lengths))[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "modality": "text",
    }


def with_grids(counts: list[int]) -> dict[str, Any]:
    grid = torch.tensor([[1, 1 + i % 3, 2] for i in range(sum(counts))]).view(-1, 3)
    patches = torch.randn(int(grid.prod(1).sum()), 4)
    return {**padded([2] * len(counts)), "image_grid_thw": grid, "pixel_values": patches, "pixel_values_videos": None}


def with_images(counts: list[int], **more: torch.Tensor) -> dict[str, Any]:
    images = {"pixel_values": torch.randn(sum(counts), 3), "image_sizes": torch.randn(sum(counts), 2)}
    return {**padded([2] * len(counts)), "num_images_per_sample": torch.tensor(counts), **images, **more}


LENGTHS = [3, 1, 7, 2, 2, 5]
COUNTS = [2, 0, 1, 3, 0, 0]
BATCHES = {
    "padded": padded(LENGTHS),
    "padded on the left": padded(LENGTHS, left=True),
    "nothing attended": padded([1, 0, 0, 0, 0, 4]),
    "expanded": {**padded(LENGTHS), "query_expansion_positions": torch.eye(6, 7)},
    "token types": {
        **padded(LENGTHS),
        "token_type_ids": torch.zeros(6, 7),
        "prompt_length": 2,
        "vectors": torch.eye(6),
    },
    "vectors alone": {"vectors": torch.randn(6, 4), "modality": "text"},
    "flattened": flattened(LENGTHS),
    "grids": {**with_grids(COUNTS), "num_images_per_sample": torch.tensor(COUNTS)},
    "a grid for each": with_grids([1] * 6),
    "images": with_images(COUNTS),
    "padded images": with_images([1] * 6, pixel_attention_mask=torch.ones(6, 3)),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("size", [1, 2, 4, 6, 9])
def test_every_entry_is_cut_as_the_oracle_cuts_it(name: str, size: int) -> None:
    features = BATCHES[name]
    assert row_count(features) == oracle._get_batch_size(features) == 6
    ranges = mini_batch_ranges(features, size)
    assert ranges == oracle._minibatch_ranges(features, size)
    for begin, end in ranges:
        found, expected = mini_batch(features, begin, end), oracle._create_minibatch(features, begin, end)
        assert list(found) == list(expected)
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(found[key], value), key
            else:
                assert found[key] == value, key


@pytest.mark.parametrize("budget", [1, 4, 7, 8, 100])
@pytest.mark.parametrize(
    "features", [padded(LENGTHS), flattened(LENGTHS), padded([9, 0, 0, 3])], ids=["pad", "flat", "empty"]
)
def test_token_budget_is_filled_greedily(features: dict[str, Any], budget: int) -> None:
    ranges = mini_batch_ranges(features, 1, budget)
    assert ranges == oracle._minibatch_ranges(features, 1, budget)
    assert [row for begin, end in ranges for row in range(begin, end)] == list(range(row_count(features)))


def test_entries_that_are_not_per_row_stay_whole() -> None:
    """The oracle slices them and breaks: a prompt length of shape (1,), a number for all, a table."""
    features = {
        **padded(LENGTHS), "prompt_length": torch.tensor([2]), "step": torch.tensor(3), "table": torch.eye(4)
    }  # fmt: skip
    for begin, end in mini_batch_ranges(features, 2):
        part = mini_batch(features, begin, end)
        assert len(part["input_ids"]) == 2
        for key in ("prompt_length", "step", "table"):
            assert part[key] is features[key]


def test_the_model_writes_to_a_dict_of_its_own() -> None:
    features = padded(LENGTHS)
    mini_batch(features, 0, 2)["sentence_embedding"] = torch.zeros(2, 3)
    assert "sentence_embedding" not in features


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(InputError, match="mini_batch_size must be a positive integer, got 0"):
        mini_batch_ranges(padded(LENGTHS), 0)
    for module in (mini_batch_ranges, oracle._minibatch_ranges):
        with pytest.raises(ValueError, match=r"neither 'cu_seq_lens_q'.* nor 'attention_mask'"):
            module({"input_ids": torch.zeros(3, 2)}, 2, 5)
    with pytest.raises(ShapeError, match="no tensor with a row per example"):
        row_count({"modality": "text"})
