"""GEMMs whose result is wider than their operands: bfloat16 or float16 in, float32 sums out.

With operands of the result's dtype these are plain `torch.mm` and `addmm_`, under whatever precision
`torch.get_float32_matmul_precision` asks for. Narrow operands go to the tensor cores with float32 results; on a device
whose GEMM cannot do that they are raised first. Where oneDNN is the faster library for float32 it is asked instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tileloss.tiled import onednn

_WIDE_RESULT_DEVICES = ("cuda",)


def multiply(
    a: Tensor,  # (N, K)
    b: Tensor,  # (K, M)
    out: Tensor,  # (N, M)
) -> Tensor:
    """`out = a @ b`, summed and stored in the dtype of `out`."""
    if b.t().is_contiguous() and onednn.serves(a, b, out):
        return onednn.multiply(a, b.t(), out)
    if a.dtype == b.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.device.type in _WIDE_RESULT_DEVICES and a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def accumulate(
    total: Tensor,  # (N, M)
    a: Tensor,  # (N, K)
    b: Tensor,  # (K, M)
    factor: float = 1.0,
) -> Tensor:
    """`total += factor * a @ b`, summed in the dtype of `total`, which may be laid out by rows or by columns."""
    if total.stride(0) == 1 < total.stride(1):
        return accumulate(total.t(), b.t(), a.t(), factor).t()
    if factor == 1.0 and onednn.serves(total, a, b):
        if a.stride(0) == 1:
            return onednn.accumulate_transposed(total, a.t(), b)
        if b.is_contiguous():
            return onednn.accumulate(total, a, b)
        if b.t().is_contiguous():
            return onednn.accumulate_by_columns(total, a, b.t())
    if a.dtype == b.dtype == total.dtype:
        return total.addmm_(a, b, alpha=factor)
    if a.device.type in _WIDE_RESULT_DEVICES and a.dtype == b.dtype:
        return torch.addmm(total, a, b, alpha=factor, out_dtype=total.dtype, out=total)
    return total.addmm_(a.to(total.dtype), b.to(total.dtype), alpha=factor)
