"""What triplets cost that miss their margin, and the gradient of it, inside a kernel."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hinges(excess, AT_ZERO: tl.constexpr, SOFT: tl.constexpr):
    """Cost and gradient of each excess: max(excess, 0), with a gradient of `AT_ZERO` at zero, or softplus.

    An excess of minus infinity costs nothing; nan stays nan.
    """
    if SOFT:
        decay = tl.exp(-tl.abs(excess))
        is_below = excess < 0.0
        return tl.where(is_below, 0.0, excess) + log1p(decay), tl.where(is_below, decay, 1.0) / (1.0 + decay)
    pull = tl.where(excess < 0.0, 0.0, 1.0)
    if AT_ZERO != 1.0:
        pull = tl.where(excess == 0.0, AT_ZERO, pull)
    return tl.where(excess < 0.0, 0.0, excess), pull


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1], small x with all their digits: what 1 + x rounds off is put back by the quotient."""
    raised = 1.0 + x
    is_tiny = raised == 1.0
    return tl.where(is_tiny, x, tl.log(raised) * (x / tl.where(is_tiny, 1.0, raised - 1.0)))
