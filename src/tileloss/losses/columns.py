"""Embedding the columns of a batch, with one forward pass for all that can share it.

A loss is handed one feature dict for each text column. The first column (the query) is embedded by itself; the others
are concatenated into one forward pass where they are alike, because small forwards leave a GPU idle. Alike means: the
same keys, one row per example in every tensor, and widths that zero padding can make equal. Otherwise each column is
embedded on its own. Values and gradients are the same either way, up to the order in which dropout is drawn.

In a loss that `torch.compile` traces, every column is embedded on its own. Whether columns are alike is a matter of
values, at which a compiler cannot look, and whether they may be merged is up to a variable that it cannot read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tileloss.errors import ColumnsError

Features = dict[str, Any]

_MERGING_IS_FORBIDDEN: ContextVar[bool] = ContextVar("merging_is_forbidden", default=False)
# sentence-transformers' wrapper losses forbid merging for the length of a block through a variable of this module
_ORACLE_MODULE = "sentence_transformers.base.losses.merged_forward"


def embed_columns(model: nn.Module, columns: Iterable[Features]) -> list[Tensor]:
    """Embeddings (B, D) of each column, in order: the "sentence_embedding" that the model adds to its features."""
    columns = list(columns)
    # of two columns there are no others to share a pass
    merges = len(columns) > 2 and not torch.compiler.is_compiling() and not _merging_is_forbidden()
    merged = _merged(columns[1:]) if merges else None
    if merged is None:
        return [model(features)["sentence_embedding"] for features in columns]
    first = model(columns[0])["sentence_embedding"]
    return [first, *model(merged)["sentence_embedding"].chunk(len(columns) - 1)]


@contextmanager
def separate_columns() -> Iterator[None]:
    """Embed every column by itself for the length of a block, in sentence-transformers' losses as in ours."""
    variables = _variables()
    tokens = [variable.set(True) for variable in variables]
    try:
        yield
    finally:
        for variable, token in zip(variables, tokens, strict=True):
            variable.reset(token)


def _variables() -> list[ContextVar[bool]]:
    """What forbids merging: our variable and, where it has been imported, sentence-transformers'."""
    oracle = sys.modules.get(_ORACLE_MODULE)
    return [_MERGING_IS_FORBIDDEN] if oracle is None else [_MERGING_IS_FORBIDDEN, oracle._MERGING_DISABLED]


def expect_columns(loss: object, columns: Sequence[Any], names: Sequence[str], more: bool = False) -> None:
    """Refuse a batch that has not the columns of these names, or, where there may be more, not all of them.

    Raises:
        ColumnsError (a ValueError, IndexError and AssertionError): with the class of `loss`, and the names.
    """
    if len(columns) == len(names) or (more and len(columns) > len(names)):
        return
    count = f"{'at least' if more else 'exactly'} {len(names)} input columns"
    raise ColumnsError(f"{type(loss).__name__} expects {count}, ({', '.join(names)}), but got {len(columns)}.")


def _merging_is_forbidden() -> bool:
    return any(variable.get() for variable in _variables())


def _merged(columns: Sequence[Features]) -> Features | None:
    """One feature dict with the rows of all columns, column after column, or None where they are not alike."""
    first = columns[0]
    if any(column.keys() != first.keys() for column in columns) or "cu_seq_lens_q" in first:
        return None
    matrices = [x for x in map(first.get, ("input_ids", "attention_mask")) if isinstance(x, Tensor) and x.ndim >= 2]
    if not matrices:
        return None
    rows = len(matrices[0])
    merged = {}
    for key in first:
        values = [column[key] for column in columns]
        if isinstance(values[0], Tensor) and key != "prompt_length":
            joined = _joined(values, rows)
            if joined is None:
                return None
            merged[key] = joined
        elif all(_equal(value, values[0]) for value in values):
            merged[key] = values[0]
        else:
            return None
    return merged


def _joined(values: Sequence[Any], rows: int) -> Tensor | None:
    """The tensors under each other, padded to one width; None unless they have a row per example and are alike."""
    first = values[0]
    for value in values:
        if not isinstance(value, Tensor) or value.ndim != first.ndim or value.ndim == 0 or len(value) != rows:
            return None
        if value.shape[2:] != first.shape[2:] or (value.shape != first.shape and value.is_floating_point()):
            return None  # zeros are padding only where an attention mask hides them: for token-like integers
    if first.ndim == 1:
        return torch.cat(list(values))
    width = max(value.shape[1] for value in values)
    padding = [0, 0] * (first.ndim - 2)
    return torch.cat([F.pad(value, [*padding, 0, width - value.shape[1]]) for value in values])


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.device == b.device and torch.equal(a, b)
    try:
        return bool(a == b)
    except (ValueError, RuntimeError):  # values without a single truth, such as arrays
        return False
