"""What the public functions ask of embeddings, before any work, in one wording."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tileloss.errors import DeviceError, DtypeError, InputError, ShapeError
from tileloss.similarity import up_dtype


def check_rows(name: str, x: Any) -> None:
    """Refuse what is no floating-point matrix, under the name that the caller knows it by.

    Raises:
        InputError: for something else than a tensor.
        ShapeError: for a tensor that is no matrix.
        DtypeError: for integers, booleans and complex numbers.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"{name} must be a tensor, got {type(x).__name__}.")
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
