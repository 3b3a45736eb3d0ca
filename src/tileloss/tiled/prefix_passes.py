"""Between the products of prefixes and their cosines: the norms, on the way there and on the way back.

`PrefixPasses` is the PyTorch form of the two passes that the driver in `matryoshka.py` needs beside those of the loss;
`tileloss.kernels.prefix_passes` has the same two in Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor


class PrefixPasses:
    """The passes over a block, or a part of its rows, in PyTorch."""

    def cosines(
        self,
        product: Tensor,  # (R, C)
        left: Tensor,  # (R,): one over the norms
        right: Tensor,  # (C,)
        out: Tensor,  # (R, C)
    ) -> None:
        """Write the products over the norms of both sides."""
        torch.mul(product, right, out=out).mul_(left[:, None])

    def answers(
        self,
        grad: Tensor,  # (R, C) of the cosines; is divided by the norms of the right
        product: Tensor,  # (R, C)
        left: Tensor,  # (R,): one over the norms
        right: Tensor,  # (C,)
    ) -> tuple[Tensor, Tensor]:
        """What the norms answer for: the sums of cosine times gradient over each row (R,) and each column (C,)."""
        terms = grad.mul_(right) * product
        return terms.sum(dim=1).mul_(left), torch.mv(terms.t(), left)
