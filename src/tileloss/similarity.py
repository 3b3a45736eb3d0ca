"""The similarities that tileloss knows, under sentence-transformers' names, and how others are recognised.

Four similarities have block algorithms: cosine, dot, negative Euclidean and negative Manhattan distance. A loss may be
given any of them by name ("cosine"), as the functions of this module, or as sentence-transformers' functions of the
same name; the latter are recognised by `__name__` and `__module__`, so that sentence-transformers is never imported.
Every other callable is materialised, unless it declares with `rowwise` that it can be computed in row blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, is_autocast_enabled

from tileloss.backend import device_type
from tileloss.errors import InputError

NORM_FLOOR = 1e-12  # the clamp of torch.nn.functional.normalize
COSINE_FLOOR = 1e-8  # the clamp of torch.nn.functional.cosine_similarity

SimilarityFn = Callable[[Tensor, Tensor], Tensor]
_Fn = TypeVar("_Fn", bound=Callable[..., Tensor])


def up_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for floats narrower than 32 bits, and every other dtype itself."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def ready_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype a gradient for an input of that one waits for the backward.

    A batch of thousands has gradients smaller than float16 goes, until a gradient scaler has multiplied the loss.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def scaled(gradient: Tensor, d_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient that has waited, times that of the loss: out of place, for a second backward to find the same."""
    return (gradient.to(d_loss.dtype) * d_loss).to(dtype)


def up(x: Tensor) -> Tensor:
    """Raise floats narrower than 32 bits to float32; leave every other dtype as it is."""
    dtype = x.dtype
    if dtype == torch.float32 or up_dtype(dtype) == dtype:  # small batches feel even a conversion to the same dtype
        return x
    return x.float()


def dense(x: Tensor) -> Tensor:
    """The tensor itself, or a dense copy of a sparse one."""
    return x if x.layout == torch.strided else x.to_dense()


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """A block in which autocast does not narrow GEMMs on the device of x: inputs count as given, sums as `up` has."""
    kind = device_type(x)
    return torch.autocast(kind, enabled=False) if is_autocast_enabled(kind) else nullcontext()


def rounded_as(
    loss: Tensor,  # 0-dim
    *embeddings: Tensor,
) -> Tensor:
    """The loss in the dtype of the embeddings, where sentence-transformers' has it; under autocast as it is.

    What autocast narrows is the model: a loss narrowed too would have the gradient scaler's factor overflow in it.
    """
    if is_autocast_enabled(device_type(loss)):
        return loss
    return loss.to(functools.reduce(torch.promote_types, (x.dtype for x in embeddings)))


def _rows(x: Any) -> Tensor:
    """A (N, D) tensor of at least float32 from a tensor, array or list; a vector counts as one row."""
    x = up(torch.as_tensor(x))
    return x.unsqueeze(0) if x.ndim == 1 else x


def _unit_rows(x: Any, floor: float = NORM_FLOOR) -> Tensor:
    """The rows over their norms, as `torch.nn.functional.normalize` has them, in fewer operations."""
    x = _rows(x)
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(floor)


def cos_sim(
    a: Tensor,  # (N, D)
    b: Tensor,  # (M, D)
) -> Tensor:  # (N, M)
    """Cosine similarity of every row of `a` with every row of `b`.

    Norms are clamped at 1e-12 inside the graph, as `torch.nn.functional.normalize` does. Inputs narrower than float32
    are computed and returned in float32. Time O(N M D); memory (N, M) for the result and copies of both inputs.

    >>> cos_sim(torch.eye(2), torch.ones(1, 2)).shape
    torch.Size([2, 1])
    """
    x = _unit_rows(a)
    return x @ (x if b is a else _unit_rows(b)).T


def torch_cosine(
    a: Tensor,  # (N, D)
    b: Tensor,  # (M, D)
) -> Tensor:  # (N, M)
    """As `cos_sim`, with the norms clamped at 1e-8, as `F.cosine_similarity` has them: it differs near zero alone."""
    return _unit_rows(a, COSINE_FLOOR) @ _unit_rows(b, COSINE_FLOOR).T


def dot_score(
    a: Tensor,  # (N, D)
    b: Tensor,  # (M, D)
) -> Tensor:  # (N, M)
    """Dot product of every row of `a` with every row of `b`, in float32 or the wider input dtype. Time O(N M D)."""
    return _rows(a) @ _rows(b).T


def euclidean_sim(
    a: Tensor,  # (N, D)
    b: Tensor,  # (M, D)
) -> Tensor:  # (N, M)
    """Negative Euclidean distance of every row of `a` to every row of `b`; the gradient at distance zero is zero."""
    return -torch.cdist(_rows(a), _rows(b), p=2.0)


def manhattan_sim(
    a: Tensor,  # (N, D)
    b: Tensor,  # (M, D)
) -> Tensor:  # (N, M)
    """Negative Manhattan (L1) distance of every row of `a` to every row of `b`. Time O(N M D)."""
    return -torch.cdist(_rows(a), _rows(b), p=1.0)


SIMILARITIES: dict[str, SimilarityFn] = {
    "cosine": cos_sim,
    "torch_cosine": torch_cosine,
    "dot": dot_score,
    "euclidean": euclidean_sim,
    "manhattan": manhattan_sim,
}
_STOCK_PACKAGES = ("tileloss", "sentence_transformers")


class StockSimilarities:
    """A family of similarities that are known by name, and how other people's functions are recognised as them.

    Attributes:
        functions: name -> our function, which carries sentence-transformers' name for it.
        method: the method of a SentenceTransformer that resolves to one of them, by its `similarity_fn_name`.
    """

    def __init__(self, functions: Mapping[str, SimilarityFn], method: str, aliases: Mapping[str, str]) -> None:
        self.functions = functions
        self.method = method
        self._ours = {fn: name for name, fn in functions.items()}
        self._by_function_name = dict(aliases) | {fn.__name__: name for name, fn in functions.items()}

    def recognise(self, similarity: str | SimilarityFn) -> str | SimilarityFn:
        """The name of a similarity of this family, or the callable itself when it is none.

        Takes a name, one of our functions or its sentence-transformers namesake, a member of sentence-transformers'
        `SimilarityFunction`, or the bound method of a SentenceTransformer.

        Raises:
            InputError: for any other name, or an object that is neither a name nor callable.
        """
        if isinstance(similarity, FunctionType) and similarity in self._ours:
            return self._ours[similarity]
        name = getattr(similarity, "value", similarity)  # an enum member carries the name as its value
        if isinstance(name, str):
            if name not in self.functions:
                raise InputError(f"similarity must be one of {list(self.functions)} or a callable, got {name!r}.")
            return name
        if not callable(similarity):
            raise InputError(f"similarity must be one of {list(self.functions)} or a callable, got {similarity!r}.")
        bound_name = self.bound(similarity)
        if bound_name in self.functions:
            return bound_name
        package = (getattr(similarity, "__module__", None) or "").partition(".")[0]
        if package not in _STOCK_PACKAGES:
            return similarity
        return self._by_function_name.get(getattr(similarity, "__name__", ""), similarity)

    def bound(self, similarity: Any) -> str:
        """The `similarity_fn_name` of the model whose bound method this is, or an empty string."""
        if getattr(similarity, "__name__", "") != self.method:
            return ""
        name = getattr(getattr(similarity, "__self__", None), "similarity_fn_name", "")
        return str(getattr(name, "value", name))


MATRICES = StockSimilarities(SIMILARITIES, "similarity", {"pytorch_cos_sim": "cosine"})


def recognise(similarity: str | SimilarityFn) -> str | SimilarityFn:
    """The name of a similarity that has a block algorithm, or the callable itself when it has none.

    As `StockSimilarities.recognise` has it, for the matrices above: "cosine", "dot", "euclidean" or "manhattan".
    """
    return MATRICES.recognise(similarity)


def similarity_fct_name(similarity: str | SimilarityFn, stock: StockSimilarities = MATRICES) -> str:
    """How a loss' configuration names a similarity of a family: sentence-transformers' own wording.

    A partial shows its keywords, `model.similarity` the function that it resolves to, an object with `get_config_dict`
    its settings; anything else its `__name__` or class name.
    """
    if isinstance(similarity, functools.partial):
        inner = getattr(similarity.func, "__name__", type(similarity.func).__name__)
        return _with_settings(inner, similarity.keywords)
    known = similarity if isinstance(similarity, str) else stock.bound(similarity)
    if known in stock.functions:
        return stock.functions[known].__name__
    name = getattr(similarity, "__name__", type(similarity).__name__)
    config = getattr(similarity, "get_config_dict", None)
    return f"{name}({_settings(config())})" if config is not None else name


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())


def _with_settings(name: str, settings: dict[str, Any]) -> str:
    return f"{name}({_settings(settings)})" if settings else name


def rowwise(similarity: _Fn) -> _Fn:
    """Declare that entry (i, j) of `similarity(a, b)` depends on row i of `a` and row j of `b` alone.

    A similarity so declared is computed in row blocks with autograd inside each block, in bounded memory; without the
    declaration a callable is given all rows at once, which is always right.

    >>> @rowwise
    ... def angular(a, b):
    ...     return 1 - cos_sim(a, b).clamp(-1, 1).acos()
    """
    similarity.is_rowwise = True  # type: ignore[attr-defined]
    return similarity


def is_rowwise(similarity: str | SimilarityFn) -> bool:
    """Whether a similarity may be computed in row blocks."""
    return isinstance(similarity, str) or getattr(similarity, "is_rowwise", False)
