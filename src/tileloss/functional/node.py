"""The call of a registered operator that goes around the dispatcher where nobody compiles.

A registered operator is opaque to `torch.compile`, and PyTorch's way to one written in Python takes 0.02 ms, with many
arguments 0.1 ms, which a batch of a few hundred rows feels, and a GPU that waits for its host. An eager call needs no
operator: the same functions make the same node of the autograd graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def node(
    operator: Callable[..., Any],
    run: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """A function that calls `operator` for a compiler, and for everybody else what it is made of.

    Args:
        operator: registered, with this backward and this way to set up its context.
        run: the function that was registered.
        setup_context: takes the context, all inputs and the output.
        backward: takes the context and the gradients of the outputs.
    """

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = run(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    def call(*inputs: Any) -> Any:
        return operator(*inputs) if torch.compiler.is_compiling() else Node.apply(*inputs)

    return call
