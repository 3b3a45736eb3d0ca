"""What the properties draw: embeddings, ordinary and extreme, in any layout; labels; and what is no argument at all.

Numbers come from a seed, and hypothesis chooses the structure around them: sizes, kinds, magnitudes, flaws, strides.
So a failure shrinks to a small batch with the one flaw that matters.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .judge import SUBJECT

# bfloat16 and float64: the former is not multiplied right in Triton's interpreter, the latter has no kernels
WIDE = (torch.float32,) if SUBJECT == "triton" else (torch.float32, torch.float64)
NARROW = (torch.float16,) if SUBJECT == "triton" else (torch.float16, torch.bfloat16)

# blocks have 7 rows
SIZES = st.integers(0, 3) | st.sampled_from([6, 7, 8, 14, 15, 20, 33])
WIDTHS = st.integers(1, 5) | st.sampled_from([0, 8, 17, 33])

KINDS = st.sampled_from(["normal", "unit", "far from the origin", "integers"])
# below the floors of norms, 1e-12 and 1e-8, and above, but not at them
MAGNITUDES = st.sampled_from([1e-30, 3e-13, 3e-9, 1e-3, 1.0, 1e3, 1e10, 1e19, 1e30])
NUMBERS = st.sampled_from([0.0, 1e-30, 3e-13, 1e30, -1e30, float("inf"), float("-inf"), float("nan")])
LAYOUTS = st.sampled_from(["contiguous", "transposed", "every other row", "every other column", "offset"])
# of two matrices: float32 and what is narrower may be mixed
DTYPES = st.tuples(*[st.sampled_from([torch.float32, *NARROW])] * 2) | st.sampled_from([(x, x) for x in WIDE])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same matrix in other strides, with nan in whatever lies between."""
    rows, width = x.shape
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "every other row":
        return x.new_full((2 * rows, width), float("nan"))[::2].copy_(x)
    if layout == "every other column":
        return x.new_full((rows, 2 * width), float("nan"))[:, ::2].copy_(x)
    if layout == "offset":
        return x.new_full((rows * width + 1,), float("nan"))[1:].view(rows, width).copy_(x)
    return x


@st.composite
def matrices(draw: st.DrawFn, rows: int, width: int, dtype: torch.dtype, extreme: bool = False) -> Tensor:
    """Embeddings (rows, width)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    kind = draw(KINDS)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    if kind == "unit":
        x = torch.nn.functional.normalize(x)
    elif kind == "far from the origin":
        x = x + 5.0
    elif kind == "integers":
        x = x.round()
    if extreme:
        x = x * draw(MAGNITUDES)
        for _ in range(draw(st.integers(0, 2)) if rows and width else 0):
            _spoil(draw, x)
    if rows and draw(st.sampled_from([False] * 5 + [True])):
        return x.to(dtype)[:1].expand(rows, width)
    return laid_out(x.to(dtype), draw(LAYOUTS))


def _spoil(draw: st.DrawFn, x: Tensor) -> None:
    """One flaw: a number, a row of one number, a row of another magnitude, or a row like another."""
    row = draw(st.integers(0, len(x) - 1))
    flaw = draw(st.sampled_from(["number", "row", "magnitude", "copy"]))
    if flaw == "number":
        x[row, draw(st.integers(0, x.shape[1] - 1))] = draw(NUMBERS)
    elif flaw == "row":
        x[row] = draw(NUMBERS)
    elif flaw == "magnitude":
        x[row] *= draw(MAGNITUDES)
    else:
        x[row] = x[draw(st.integers(0, len(x) - 1))]


@st.composite
def queries_and_docs(draw: st.DrawFn, extreme: bool = False) -> tuple[Tensor, Tensor]:
    """Queries (B, D) and docs (M, D), M at least B and often a multiple of it."""
    size, width, dtypes = draw(SIZES), draw(WIDTHS), draw(DTYPES)
    count = draw(st.sampled_from([size, size, 2 * size, size + 1, size + 9]))
    return tuple(  # type: ignore[return-value]
        draw(matrices(rows, width, dtype, extreme)) for rows, dtype in zip((size, count), dtypes, strict=True)
    )


@st.composite
def classes(draw: st.DrawFn, size: int, floats: bool = True) -> Tensor:
    """A class for each row: few or many, negative, beyond 32 bits, of any dtype that can tell them apart."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    labels = torch.randint(draw(st.sampled_from([1, 2, 3, 1000])), (size,), generator=generator)
    kind = draw(st.sampled_from(["small", "negative", "huge", "bool", "int32"] + ["float"] * floats))
    if kind == "negative":
        labels = -labels
    elif kind == "huge":
        labels = (1 << 62) + labels
    elif kind == "bool":
        labels = labels % 2 == 1
    elif kind == "int32":
        labels = labels.int()
    elif kind == "float":
        labels = labels / 7
    return labels[:, None] if draw(st.booleans()) else labels


# what no argument of a public function is, or is only now and then
JUNK = st.sampled_from(
    [
        None, "", "no such name", b"bytes", (), [], {}, 0, -1, 7, 1.5, -1.0, float("nan"), float("inf"), True,
        ("cosine",), ["query_to_doc", "no such name"], ("query_to_doc", 3), [0], [1.5], {3: "a"}, object(),
        torch.tensor(1.0), torch.tensor([1, 2]), torch.ones(3, 3), torch.ones(2, 2, 2), torch.ones(3, 3).bool(),
        torch.ones(3, 3, dtype=torch.complex64), torch.ones(0, 0), torch.arange(3), [torch.ones(3, 3)], [None],
        ("in_batch_negatives", "a"), ("in_batch_negatives", float("nan")), (None, 1.0), ("no such name", 1.0),
    ]
)  # fmt: skip


@st.composite
def spoiled(draw: st.DrawFn, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with one of them, or two, replaced by junk."""
    names = draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True))
    return arguments | {name: draw(JUNK) for name in names}
