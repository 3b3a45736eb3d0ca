"""Cutting a batch of features into mini-batches of rows.

A feature dict holds tensors with a row per example, tensors and values that concern all examples, and, from some
collators, tensors without a row axis: the tokens of all examples in one line with their boundaries in `cu_seq_lens_q`,
or the patches of all images under each other with their counts beside them. A mini-batch is what the model would have
been given, had the batch been only these rows. Columns that are padding in every row of a mini-batch are cut off, so
that short texts are not embedded at the width of the longest text of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor

from tileloss.errors import InputError, ShapeError

Features = dict[str, Any]
Range = tuple[int, int]

# patches of all images under each other; a grid gives the number of each image's, a count the images of each example
_PATCHES = (
    ("pixel_values", "image_grid_thw", "num_images_per_sample"),
    ("pixel_values_videos", "video_grid_thw", "num_videos_per_sample"),
)
_ONE_ROW_PER_IMAGE = ("pixel_values", "image_position_ids", "image_sizes")
# with one of these, images are padded to the same number for each example and have a row axis after all
_PADDED_IMAGES = ("pixel_attention_mask", "aspect_ratio_ids")


def row_count(features: Features) -> int:
    """How many examples a feature dict holds."""
    if "cu_seq_lens_q" in features:
        return len(features["cu_seq_lens_q"]) - 1
    named = [features.get(key) for key in ("input_ids", "attention_mask")]
    for value in (*named, *features.values()):
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise ShapeError(f"The features hold no tensor with a row per example, only {sorted(features)}.")


def check_mini_batch_num_tokens(num_tokens: int | None) -> None:
    """Refuse a number of tokens that no mini-batch can have."""
    if num_tokens is not None and num_tokens <= 0:
        raise InputError(f"mini_batch_num_tokens must be a positive integer or None. Got {num_tokens!r}.")


def mini_batch_ranges(features: Features, size: int, num_tokens: int | None = None) -> list[Range]:
    """The rows [begin, end) of each mini-batch, in order.

    Args:
        features: one column of a batch.
        size: rows of a mini-batch, where `num_tokens` is None.
        num_tokens: as many rows as have at most this many tokens, padding not counted; a longer one is alone.

    Raises:
        InputError: for a size below 1, or tokens that cannot be counted.
    """
    if num_tokens is not None:
        return _ranges_by_tokens(_token_counts(features), num_tokens)
    if size < 1:
        raise InputError(f"mini_batch_size must be a positive integer, got {size}.")
    rows = row_count(features)
    return [(begin, min(begin + size, rows)) for begin in range(0, rows, size)]


def _token_counts(features: Features) -> list[int]:
    if "cu_seq_lens_q" in features:
        return features["cu_seq_lens_q"].diff().tolist()
    if "attention_mask" in features:
        return features["attention_mask"].sum(dim=1).tolist()
    raise InputError(
        "mini_batch_num_tokens needs the number of tokens of every example, but the features hold neither "
        "'cu_seq_lens_q' (flattened inputs) nor 'attention_mask' (padded inputs). Use mini_batch_size instead."
    )


def _ranges_by_tokens(counts: Sequence[int], budget: int) -> list[Range]:
    starts, tokens = [0], 0
    for row, count in enumerate(counts):
        if row > starts[-1] and tokens + count > budget:
            starts.append(row)
            tokens = 0
        tokens += count
    return list(pairwise([*starts, len(counts)])) if counts else []


def mini_batch(features: Features, begin: int, end: int) -> Features:
    """The features of rows [begin, end) alone, as views: a new dict, for the model to write to."""
    end = min(end, row_count(features))
    if "cu_seq_lens_q" in features:
        return _from_flattened(features, begin, end)
    rows, others = row_count(features), _image_ranges(features, begin, end)
    width, attended = _attended_width(features, begin, end)
    part: Features = {}
    for key, value in features.items():
        if key in others:
            first, last = others[key]
            if first < last:  # a model takes a missing key for "no images here", and chokes on an empty tensor
                part[key] = value[first:last]
        elif not isinstance(value, Tensor) or value.ndim == 0 or len(value) != rows:
            part[key] = value
        elif value.ndim > 1 and value.shape[1] == width:
            part[key] = value[begin:end, :attended]
        else:
            part[key] = value[begin:end]
    return part


def _attended_width(features: Features, begin: int, end: int) -> tuple[int | None, int | None]:
    """The width of the attention mask, and up to where any of these rows attends to it; padding before texts stays."""
    mask = features.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None, None
    active = mask[begin:end].bool()
    expansion = features.get("query_expansion_positions")  # not attended to, and yet part of the embedding
    if isinstance(expansion, Tensor):
        active = active | expansion[begin:end].bool()
    positions = active.any(dim=0).nonzero()
    width = mask.shape[1]
    return width, int(positions[-1]) + 1 if len(positions) else width


def _image_ranges(features: Features, begin: int, end: int) -> dict[str, Range]:
    """Rows [first, last) of the tensors whose first axis counts images or their patches."""
    ranges: dict[str, Range] = {}
    for patches_key, grid_key, count_key in _PATCHES:
        patches, grid, counts = map(features.get, (patches_key, grid_key, count_key))
        if patches is None or grid is None:
            continue
        if counts is not None:
            images = ranges[grid_key] = _span(counts.tolist(), begin, end)
        elif len(grid) == row_count(features):
            images = begin, end
        else:
            continue
        ranges[patches_key] = _span(grid.prod(dim=1).tolist(), *images)
    counts, pixels = features.get("num_images_per_sample"), features.get("pixel_values")
    if counts is None or pixels is None or "pixel_values" in ranges or any(key in features for key in _PADDED_IMAGES):
        return ranges
    if len(pixels) == int(counts.sum()):
        span = _span(counts.tolist(), begin, end)
        ranges.update({key: span for key in _ONE_ROW_PER_IMAGE if key in features})
    return ranges


def _span(counts: Iterable[int], begin: int, end: int) -> Range:
    """Where the items of owners [begin, end) lie, when owner i has counts[i] of them."""
    bounds = [0, *accumulate(counts)]
    return bounds[begin], bounds[end]


def _from_flattened(features: Features, begin: int, end: int) -> Features:
    """As `mini_batch`, of examples whose tokens stand in one line."""
    bounds = features["cu_seq_lens_q"]
    first, last, total = (int(bounds[i]) for i in (begin, end, -1))
    own_bounds = bounds[begin : end + 1] - first
    part = dict(features)
    for key, value in features.items():
        if key in ("cu_seq_lens_q", "cu_seq_lens_k"):
            part[key] = own_bounds
        elif key in ("max_length_q", "max_length_k"):
            part[key] = int(own_bounds.diff().max())
        elif isinstance(value, Tensor) and value.ndim and value.shape[-1] == total:
            part[key] = value[..., first:last]
    if isinstance(features.get("seq_idx"), Tensor):
        part["seq_idx"] = part["seq_idx"] - begin
    return part
