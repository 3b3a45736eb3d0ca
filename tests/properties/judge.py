"""When the answer of a backend counts as the definition's.

The definition is run four times: in float64, which is the truth; in the dtype of the inputs; and twice on inputs that
were moved by a few units in the last place of the sums, there and back. How far the last three are from the truth is
how well the answer can be known in this dtype. A backend may be three times as far, and a little: that of
docs/design.md. Before it is found wrong, the inputs are moved in a dozen other ways.

Where terms of a gradient cancel, as in a cosine of one number, all that is left is their rounding. So a call says how
steep its function is, and what rounding makes of that counts too, in cosines over the norms of the rows.

Where the truth and the other three are all finite, the answer must be. Where none of them is, the answer must not be
finite either, or a mistake upstream would pass for a number. Where they disagree, as where float32 overflows and
float64 does not, the answer may be either: but if it is finite, it must be right.

Two things are promised of finite numbers alone. With others among inputs or values, indices and counts may be
anything, and so may a row of a gradient that has nan in it: autograd through a matrix spreads nan by multiplying it by
zero. And of rows so long that the squares of their norms overflow, directions are not to be had, neither here nor in
PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tileloss
from tileloss.backend import interpreting
from tileloss.errors import BackendError, InputError
from tileloss.similarity import NORM_FLOOR, up, up_dtype

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# what is judged: kernels where they can run, else blocks in PyTorch
SUBJECT = "triton" if interpreting() or DEVICE == "cuda" else "tiled"

_TIMES = 3.0
# of values and of gradients, relative to their norms, without and with float64 inputs
_SLACK = {False: (1e-5, 1e-4), True: (1e-8, 1e-8)}


@dataclass
class Call:
    """A function of tensors that get gradients, all else being settled.

    Attributes:
        function: takes the inputs; returns a tensor, or tensors in tuples, lists and dicts.
        inputs: of any dtypes and strides.
        settings: for people to read.
        slope: how large the terms of a gradient are, of unit rows where only directions count.
        directions: the prefix widths at which only a row's direction counts.
    """

    function: Callable[..., Any]
    inputs: list[Tensor]
    settings: Mapping[str, Any]
    slope: float
    directions: Sequence[int] = ()

    def __repr__(self) -> str:
        shapes = ", ".join(f"{tuple(x.shape)} {x.stride()} {x.dtype}".replace("torch.", "") for x in self.inputs)
        return f"Call({shapes}; {dict(self.settings)})"


@dataclass
class Answer:
    values: list[Tensor]
    gradients: list[Tensor]

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((f"value {i}", x) for i, x in enumerate(self.values))
        yield from ((f"gradient {i}", x) for i, x in enumerate(self.gradients))


def answer(call: Call, inputs: Sequence[Tensor], backend: str) -> Answer:
    """The values, and the gradients of a weighted sum of those that have any, on the CPU."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with tileloss.use_backend(backend):
        values = list(_flat(call.function(*leaves)))
    smooth = [x for x in values if x.requires_grad]
    gradients = [torch.zeros_like(x) for x in leaves]
    if smooth:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in smooth]
        gradients = list(torch.autograd.grad(smooth, leaves, weights, allow_unused=True, materialize_grads=True))
    return Answer([x.detach().cpu() for x in values], [x.cpu() for x in gradients])


def assert_definition(call: Call) -> None:
    """The subject gives the definition's answer, twice the same, or its refusal, and leaves its inputs alone."""
    inputs = [x.to(DEVICE) for x in call.inputs]
    before = [x.clone() for x in inputs]
    try:
        found, again = (answer(call, inputs, SUBJECT) for _ in range(2))
    except InputError as refusal:
        with pytest.raises(type(refusal), match=re.escape(str(refusal))):
            answer(call, inputs, "reference")
        return
    for x, y in zip(inputs, before, strict=True):
        assert _same(x, y), f"an input was written to by {call}"
    for (name, x), (_, y) in zip(found.parts(), again.parts(), strict=True):
        assert _same(x, y), f"{name} came out another the second time, of {call}"
    if _overflows(call.inputs):
        return
    truth = answer(call, [x.double() for x in call.inputs], "reference")
    moved = [call.inputs, _moved(call.inputs, 0, 1.0), _moved(call.inputs, 0, -1.0)]
    others = [answer(call, x, "reference") for x in moved]
    complaint = _complaint_of(call, found, truth, others)
    if complaint:
        # two moves may by chance leave as it was what rounding decides, a tie or a threshold; a dozen more do not
        others += [answer(call, _moved(call.inputs, seed, 1.0), "reference") for seed in range(1, 13)]
        complaint = _complaint_of(call, found, truth, others)
    assert not complaint, complaint


def _complaint_of(call: Call, found: Answer, truth: Answer, others: Sequence[Answer]) -> str:
    """What is wrong with the answer, or an empty string; the first of the others is of the inputs as they are."""
    # minus infinity is a value that stands for nothing at all
    strict = all((x < float("inf")).all() for x in truth.values) and all(x.isfinite().all() for x in call.inputs)
    loss = truth.values[0] if truth.values and truth.values[0].ndim == 0 else torch.zeros(())
    size = max(1.0, abs(loss.nan_to_num(0.0, 0.0, 0.0).item()))
    parts = zip(found.parts(), truth.parts(), *(other.parts() for other in others), strict=True)
    for (name, ours), (_, right), *rest in parts:
        eager, *_ = rounded = [x for _, x in rest]
        assert ours.shape == eager.shape, f"{name} has shape {ours.shape}, not {eager.shape}, of {call}"
        assert ours.dtype == eager.dtype, f"{name} is {ours.dtype}, not {eager.dtype}, of {call}"
        tolerance = _tolerance(call, name, ours.dtype, size)
        only_finite = not strict and (name.startswith("gradient") or not ours.is_floating_point())
        complaint = _complaint(ours, right, rounded, tolerance, only_finite)
        if complaint:
            return f"{name} {complaint}, of {call}\n{ours}\nis not\n{right}\neagerly\n{eager}"
    return ""


class _NoWork(TorchDispatchMode):
    """A block in which no product is computed, nor any operator of ours."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(x in name for x in ("tileloss", "mm", "dot", "cdist", "sort")), name
        return func(*args, **(kwargs or {}))


def assert_refused_alike(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Every backend takes the arguments, or all refuse them in the same words, before any work."""
    refusals = {}
    for backend in ("auto", "reference", SUBJECT):
        moved = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in arguments.items()}
        try:
            function(**moved, backend=backend)
            refusals[backend] = None
        except BackendError:
            continue
        except InputError as error:
            with pytest.raises(type(error)), _NoWork():
                function(**moved, backend=backend)
            refusals[backend] = f"{type(error).__name__}: {error}"
    assert len(set(refusals.values())) == 1, refusals


def _overflows(inputs: Sequence[Tensor]) -> bool:
    """Whether the finite numbers of a row have squares whose sum is not finite, in the dtype of the sums."""
    squares = [up(x).nan_to_num(0.0, 0.0, 0.0).square().sum(dim=-1) for x in inputs]
    return not all(x.isfinite().all() for x in squares)


def _tolerance(call: Call, name: str, dtype: torch.dtype, size: float) -> tuple[float, float]:
    """How far a part may be from the truth beyond three times what is known of it: relatively, and absolutely.

    `size` is that of the numbers whose differences count: a loss as large as this has lost the digits below it.
    """
    part, place = name.split()
    dtypes = [x.dtype for x in call.inputs]
    relative = _SLACK[torch.float64 in dtypes][part == "gradient"]
    absolute = 8 * call.slope * size * max((torch.finfo(up_dtype(x)).eps for x in dtypes), default=0.0)
    if dtype.is_floating_point:
        # half a unit whenever it is rounded: when it is ready, as what it is multiplied by is, and as the product
        relative += 1.5 * max(torch.finfo(x).eps for x in [dtype, *(dtypes if part == "gradient" else [])])
    if part == "gradient" and call.directions and call.inputs[int(place)].ndim == 2:
        x = call.inputs[int(place)].double()
        norms = torch.stack([torch.linalg.vector_norm(x[:, :width], dim=1) for width in call.directions])
        absolute *= 1.0 + torch.linalg.vector_norm(1 / norms.nan_to_num(1.0, 1.0).clamp_min(NORM_FLOOR)).item()
    return relative, absolute


def _complaint(
    ours: Tensor,
    truth: Tensor,
    others: list[Tensor],
    tolerance: tuple[float, float],
    only_finite: bool,
) -> str:
    """What is wrong, or an empty string; with `only_finite`, of those numbers that all find finite."""
    if not ours.is_floating_point():
        wrong = torch.stack([x == truth for x in others]).all(dim=0) & (ours != truth)
        return "differs where it is certain" if bool(wrong.any()) and not only_finite else ""
    relative, absolute = tolerance
    largest = truth.double().abs() + absolute  # which a narrow dtype need not hold
    finite = torch.stack([x.isfinite() for x in (truth, largest.to(ours.dtype), *others)])
    ours, truth, *others = (x.double() for x in (ours, truth, *others))
    everywhere, nowhere = finite.all(dim=0), ~finite.any(dim=0)
    if only_finite:
        everywhere, nowhere = everywhere & ours.isfinite(), torch.zeros_like(nowhere)
        everywhere = everywhere.all(dim=-1, keepdim=True).expand_as(everywhere)
    if bool((everywhere & ~ours.isfinite()).any()):
        return "is not finite where the definition is"
    if bool((nowhere & ours.isfinite()).any()):
        return "is finite where the definition is not"
    error, size = _norm(ours - truth, everywhere), _norm(truth, everywhere)
    known = max(_norm(x - truth, everywhere) for x in others)
    if error > _TIMES * known + relative * size + absolute:
        return f"is {error:.1e} from the truth, which is {size:.1e} and known to {known:.1e}"
    doubtful = truth.isfinite() & ours.isfinite() & ~everywhere & (not only_finite)
    slack = absolute + relative * _norm(truth, doubtful)
    doubt = torch.stack([(x - truth).abs().nan_to_num(0.0, 0.0) for x in others]).amax(dim=0)
    if bool(((ours - truth).abs() > _TIMES * doubt + 1e-2 * truth.abs() + slack)[doubtful].any()):
        return "is finite where the definition overflows, and wrong"
    return ""


def _norm(x: Tensor, where: Tensor) -> float:
    """The norm of some numbers, whatever their magnitude."""
    chosen = x[where].abs()
    largest = chosen.max().item() if chosen.numel() else 0.0
    return largest * torch.linalg.vector_norm(chosen / largest).item() if largest else 0.0


def _moved(inputs: Sequence[Tensor], seed: int, sign: float) -> list[Tensor]:
    """The inputs a few units away in the last place of the sums, one way or the other."""
    generator = torch.Generator().manual_seed(seed)
    moved = []
    for x in inputs:
        dtype = up_dtype(x.dtype)
        step = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
        moved.append((x.double() * (1 + 4 * sign * step * torch.finfo(dtype).eps)).to(dtype))
    return moved


def _flat(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, Mapping):
        yield from _flat(tuple(found.values()))
    elif found is not None:
        for x in found:
            yield from _flat(x)


def _same(x: Tensor, y: Tensor) -> bool:
    """Equal to the last bit, but that any nan equals any other."""
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(0.0), y.nan_to_num(0.0))
