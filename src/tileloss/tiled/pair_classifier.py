"""A classifier over pairs in row blocks, without the concatenated features.

A product with concatenated features is a sum of products with slices of the weight: logits = u U' + v V' + |u - v| W'
+ (u * v) M'. The embeddings are read where they are; |u - v| and u * v exist for one block of rows, in scratch memory
that stays in the cache. On the way back each block's features are made again, which costs less than reading them
would, and the gradients of u and v are written once, from products with the same slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tileloss.reference.pair_classifier import PairParts
from tileloss.similarity import full_precision, up_dtype

# bytes of one side's embeddings in a block: on a CPU, five such matrices should stay in a core's second-level cache
_BLOCK_BYTES = {"cpu": 1 << 19, "cuda": 64 << 20}


def pair_logits(
    first: Tensor,  # (B, D)
    second: Tensor,  # (B, D)
    weight: Tensor,  # (C, parts.vectors * D)
    bias: Tensor | None,  # (C,)
    parts: PairParts,
) -> Tensor:  # (B, C)
    """The logits, in the weight's dtype. Memory beside the result: one block of features."""
    dtype = up_dtype(weight.dtype)
    # classes by rows: with a few classes and many rows, MKL is four times as fast that way round
    logits = torch.zeros(len(weight), len(first), dtype=dtype, device=first.device)
    if bias is not None:
        logits += bias[:, None]
    slices = _slices(weight.to(dtype), parts)
    blocks = _Blocks(first, second, parts, dtype)
    with full_precision(first):
        for rows, u, v in blocks:
            for feature, part in zip(blocks.features(u, v), slices, strict=True):
                logits[:, rows].addmm_(part, feature.t())
    return logits.t().to(weight.dtype).contiguous()


def pair_logits_backward(
    d_logits: Tensor,  # (B, C)
    first: Tensor,  # (B, D)
    second: Tensor,  # (B, D)
    weight: Tensor,  # (C, parts.vectors * D)
    parts: PairParts,
    needs: Sequence[bool],  # whether first, second, weight and bias want a gradient
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of first, second, weight and bias. Memory beside them: a few blocks of features."""
    dtype = up_dtype(weight.dtype)
    d_logits = d_logits.to(dtype)
    slices = [part.contiguous() for part in _slices(weight.to(dtype), parts)]
    d_first, d_second = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip((first, second), needs, strict=False)
    )
    d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs[2] else None
    blocks = _Blocks(first, second, parts, dtype)
    with full_precision(first):
        for rows, u, v in blocks:
            upstream = d_logits[rows]
            if d_weight is not None:
                for feature, d_part in zip(blocks.features(u, v), _slices(d_weight, parts), strict=True):
                    d_part.addmm_(upstream.t(), feature)
            if d_first is not None or d_second is not None:
                for gradient, whole in zip(blocks.pull(upstream, u, v, slices), (d_first, d_second), strict=True):
                    if whole is not None:
                        whole[rows] = gradient
    return (
        d_first,
        d_second,
        None if d_weight is None else d_weight.to(weight.dtype),
        d_logits.sum(dim=0).to(weight.dtype) if needs[3] else None,
    )


def _slices(
    weight: Tensor,  # (C, parts.vectors * D)
    parts: PairParts,
) -> Sequence[Tensor]:  # each (C, D)
    return weight.tensor_split(parts.vectors, dim=1)


class _Blocks:
    """The pairs block by block, and the scratch memory in which a block's features and gradients are made."""

    def __init__(
        self,
        first: Tensor,  # (B, D)
        second: Tensor,  # (B, D)
        parts: PairParts,
        dtype: torch.dtype,
    ) -> None:
        self.first, self.second, self.parts, self.dtype = first, second, parts, dtype
        size, width = first.shape
        room = _BLOCK_BYTES.get(first.device.type, _BLOCK_BYTES["cuda"])
        self.step = min(max(room // (width * dtype.itemsize), 1), size)
        self._scratch: list[Tensor] = []

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The rows of each block and its u and v, (R, D) each."""
        for start in range(0, len(self.first), self.step):
            rows = slice(start, start + self.step)
            yield rows, self.first[rows].to(self.dtype), self.second[rows].to(self.dtype)

    def _scratch_for(
        self,
        u: Tensor,  # (R, D)
        count: int,
    ) -> list[Tensor]:
        """So many (R, D) tensors, the same at every call: fresh ones would cost more than what is computed in them."""
        while len(self._scratch) < count:
            self._scratch.append(torch.empty(self.step, u.shape[1], dtype=self.dtype, device=u.device))
        return [x[: len(u)] for x in self._scratch[:count]]

    def features(
        self,
        u: Tensor,  # (R, D)
        v: Tensor,  # (R, D)
    ) -> Iterator[Tensor]:  # each (R, D)
        """The features of one block of pairs, one after the other."""
        (scratch,) = self._scratch_for(u, 1)
        if self.parts.rep:
            yield u
            yield v
        if self.parts.difference:
            yield torch.sub(u, v, out=scratch).abs_()
        if self.parts.multiplication:
            yield torch.mul(u, v, out=scratch)

    def pull(
        self,
        upstream: Tensor,  # (R, C): the gradient of the logits
        u: Tensor,  # (R, D)
        v: Tensor,  # (R, D)
        slices: Sequence[Tensor],  # each (C, D)
    ) -> tuple[Tensor, Tensor]:
        """The gradients of u and v, (R, D) each."""
        du, dv, pull, sign = self._scratch_for(u, 4)
        pulls = iter(slices)
        for gradient in (du, dv):
            if self.parts.rep:
                torch.mm(upstream, next(pulls), out=gradient)
            else:
                gradient.zero_()
        if self.parts.difference:
            torch.sub(u, v, out=sign).sign_()  # zero where u = v: there is no slope
            torch.mm(upstream, next(pulls), out=pull).mul_(sign)
            du += pull
            dv -= pull
        if self.parts.multiplication:
            torch.mm(upstream, next(pulls), out=pull)
            du.addcmul_(pull, v)
            dv.addcmul_(pull, u)
        return du, dv
