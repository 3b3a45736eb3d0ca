"""What the public functions ask of embeddings, before any work, in one wording."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tileloss.errors import DeviceError, DtypeError, InputError, ShapeError
from tileloss.similarity import up_dtype


def check_tensor(name: str, x: Any, meaning: str = "") -> None:
    """Refuse what is no tensor, or a tensor of which each process has a part; `meaning` goes on after "a tensor".

    Raises:
        InputError: for either.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"{name} must be a tensor{meaning}, got {type(x).__name__}.")
    if is_distributed_tensor(x):
        raise InputError(
            f"{name} must be a plain tensor{meaning}, got a DTensor. Give its full_tensor(), or, where processes have "
            "parts of the batch, its to_local()."
        )


def is_distributed_tensor(x: Tensor) -> bool:
    """Whether it is a DTensor, told by what only those have: their class is slow to import."""
    return hasattr(x, "full_tensor")


def check_rows(name: str, x: Any) -> None:
    """Refuse what is no floating-point matrix, under the name that the caller knows it by.

    Raises:
        InputError: for something else than a tensor, and for a DTensor.
        ShapeError: for a tensor that is no matrix.
        DtypeError: for integers, booleans and complex numbers.
    """
    check_tensor(name, x)
    if x.ndim != 2:
        raise ShapeError(f"{name} must be a matrix of embeddings (rows, dimension), got shape {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise DtypeError(f"{name} must hold floating-point numbers, got {x.dtype}.")


def check_queries_and_docs(queries: Any, docs: Any) -> None:
    """Refuse queries (B, D) and docs (M, D) that do not fit together, or fewer docs than queries.

    Raises:
        ShapeError, DtypeError, DeviceError, InputError: saying which of the two to change, and how.
    """
    check_rows("queries", queries)
    check_rows("docs", docs)
    if queries.device != docs.device:
        raise DeviceError(f"queries are on {queries.device} and docs on {docs.device}; move both to one device.")
    if queries.shape[1] != docs.shape[1]:
        raise ShapeError(f"queries have width {queries.shape[1]} and docs {docs.shape[1]}; embed both by one model.")
    if up_dtype(queries.dtype) != up_dtype(docs.dtype):
        raise DtypeError(f"queries are {queries.dtype} and docs {docs.dtype}; convert one to the other's dtype.")
    if len(docs) < len(queries):
        raise ShapeError(
            f"There are {len(queries)} queries and only {len(docs)} docs: docs[i] must be the positive of queries[i]."
        )


def check_labels(
    labels: Any,
    rows: Tensor,  # (B, ...)
    name: str,
    meaning: str,
    nan: str,
) -> Tensor:  # (B,)
    """Refuse labels that are not one real number for each row, and give the others as a vector.

    Args:
        name: what the rows are called, in the plural.
        meaning: what a label is, in the singular.
        nan: what is wrong with nan as a label, and what to do about it.

    Raises:
        InputError: for something else than a plain tensor; on a CPU, where looking costs nothing, for nan.
        ShapeError, DtypeError, DeviceError: for a tensor that does not fit.
    """
    size = len(rows)
    check_tensor("labels", labels, f" with one {meaning} for each row")
    if labels.shape not in ((size,), (size, 1)):
        raise ShapeError(
            f"There are {size} {name}, so labels must have shape ({size},) or ({size}, 1), got {tuple(labels.shape)}."
        )
    if labels.is_complex():
        raise DtypeError(f"labels must hold integers or floating-point numbers, got {labels.dtype}.")
    if labels.device != rows.device:
        raise DeviceError(f"labels are on {labels.device} and the {name} on {rows.device}; move them there.")
    # a GPU would have to be waited for, and a compiler cannot look at values
    looks = labels.is_floating_point() and labels.is_cpu and not torch.compiler.is_compiling()
    if looks and labels.isnan().any():
        raise InputError(f"labels hold nan, {nan}")
    return labels.reshape(-1)
