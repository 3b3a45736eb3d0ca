"""The logits of a linear classifier over pairs of embeddings, without the concatenated features.

The classifier of Sentence-BERT reads (u, v, |u - v|), half as much again as the embeddings; autograd keeps that and
makes a gradient of the same size. Here the features exist for one block of rows at a time, forward and backward. What
that costs is a second computation of |u - v|, which is less than reading it from memory.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, is_autocast_enabled

from tileloss.arguments import items
from tileloss.backend import accepts_backend, choose, device_type, is_small, requested
from tileloss.errors import DeviceError, DtypeError, InputError, ShapeError
from tileloss.functional.checks import check_rows
from tileloss.functional.pair_classifier_op import block_pair_logits
from tileloss.reference.pair_classifier import PairParts
from tileloss.reference.pair_classifier import pair_logits as definition
from tileloss.similarity import dense, full_precision

_OBSTACLES = {"triton": "the classifier over pairs has no kernels: it is GEMMs of PyTorch's on every device"}

# numbers in one side's embeddings to one of the similarities by which backends are chosen. On two CPU cores both forms
# take the same time at 200 pairs of width 768 or at 1,000 of them, by what else the caches hold
_NUMBERS_PER_SIMILARITY, _NUMBERS_PER_SIMILARITY_ON_CPU = 3, 8


@accepts_backend
def pair_logits(
    first: Tensor,  # (B, D)
    second: Tensor,  # (B, D)
    weight: Tensor,  # (C, K D)
    bias: Tensor | None = None,  # (C,)
    *,
    concatenate: Collection[str] = ("rep", "difference"),
    backend: str | None = None,
) -> Tensor:  # (B, C)
    """The logits of a linear classifier over the features [u, v, |u - v|, u * v] of each pair (u, v) of rows.

    Args:
        first: u, (B, D) floating point, any strides; sparse ones are made dense.
        second: v, (B, D).
        weight: (C, K D) for C classes, as `torch.nn.Linear` has it, where K counts the vectors concatenated.
        bias: (C,), or None for none.
        concatenate: which features there are, always in the order of "rep" (u and v: two vectors), "difference"
            (|u - v|), "multiplication" (u * v).
        backend: "reference", "tiled" or "auto", for this call alone; see `tileloss.backend`.

    Returns:
        (B, C) in the weight's dtype, in which also the features are computed, or in float32 if that is narrower.
        Differentiable in first, second, weight and bias; the slope of |u - v| at zero is zero. A second derivative
        goes through the materialised definition: exact, in O(B K D) memory.

    Raises:
        ShapeError, DtypeError, DeviceError, InputError: for inputs that do not fit, before any work.
        BackendError: for a backend that was asked for by name and cannot run.

    Cost:
        Time O(B C K D), one read of the embeddings forward, one backward, and one write of their gradients. Memory
        beside inputs, logits and gradients: four blocks of half a MB on a CPU, of 64 MB on a GPU.

    Source:
        Reimers and Gurevych 2019 (arXiv 1908.10084), section 3: the classification objective function.

    >>> u, v = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)
    >>> classifier = torch.nn.Linear(3 * 4, 2)
    >>> logits = pair_logits(u, v, classifier.weight, classifier.bias)
    >>> torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1] * 4)).backward()
    """
    return logits_of_pairs(first, second, weight, bias, _parts(concatenate))


def are_few(
    first: Tensor,  # (B, D)
    second: Tensor,  # (B, D)
) -> bool:
    """Whether blocks would not pay for these pairs: their features may go to the layer as they are."""
    shape = first.shape
    return (
        len(shape) == 2
        and second.shape == shape
        and is_small(first, _similarities(first))
        and not is_autocast_enabled(device_type(first))
    )


def _similarities(first: Tensor) -> int:
    return first.numel() // (_NUMBERS_PER_SIMILARITY_ON_CPU if first.is_cpu else _NUMBERS_PER_SIMILARITY)


def logits_of_pairs(
    first: Tensor,  # (B, D)
    second: Tensor,  # (B, D)
    weight: Tensor,  # (C, K D)
    bias: Tensor | None,  # (C,)
    parts: PairParts,
) -> Tensor:  # (B, C)
    """As `pair_logits`, for those who need no names for the features."""
    _check(first, second, weight, bias, parts)
    first, second = dense(first), dense(second)
    # Triton is refused by name alone: of an automatic choice it means blocks, and those are the fastest there is
    obstacles = _OBSTACLES if requested() == "triton" else None
    chosen = choose(first, _similarities(first), obstacles).backend
    if chosen == "reference" or first.numel() == 0:  # without numbers there are no blocks
        with full_precision(first):
            return definition(first, second, weight, bias, parts)
    return block_pair_logits(first, second, weight, bias, parts)


def _parts(concatenate: Collection[str]) -> PairParts:
    expected = f"concatenate must name at least one of {list(PairParts._fields)}, each once"
    given = items(concatenate, expected)
    parts = PairParts(*(name in given for name in PairParts._fields))
    if sum(parts) < max(len(given), 1):
        raise InputError(f"{expected}, got {concatenate!r}.")
    return parts


def _check(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None, parts: PairParts) -> None:
    check_rows("first", first)
    check_rows("second", second)
    check_rows("weight", weight)
    if first.shape != second.shape:
        raise ShapeError(
            f"first has shape {tuple(first.shape)} and second {tuple(second.shape)}: row i of both is one pair."
        )
    width = parts.vectors * first.shape[1]
    if weight.shape[1] != width:
        raise ShapeError(
            f"The weight has {weight.shape[1]} columns, and the features of a pair are {parts.vectors} vectors of "
            f"{first.shape[1]} numbers: it must have {width}."
        )
    if bias is not None and not isinstance(bias, Tensor):
        raise InputError(f"bias must be a tensor or None, got {type(bias).__name__}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(
            f"bias has shape {tuple(bias.shape)}: there must be one number for each of {len(weight)} rows."
        )
    if bias is not None and bias.dtype != weight.dtype:
        raise DtypeError(f"The bias is {bias.dtype} and the weight {weight.dtype}; convert one to the other's dtype.")
    device = first.device
    if second.device != device or weight.device != device or (bias is not None and bias.device != device):
        devices = [str(x.device) for x in (first, second, weight, bias) if x is not None]
        raise DeviceError(f"The inputs are on {', '.join(devices)}; move all to one device.")
