"""What a loss trains beside its model (a classifier, a projection, a scale, a decoder), over several processes.

Trainers wrap the model in DistributedDataParallel and not the loss, so that nothing averages the gradients of the
loss's own parameters: every process would train a classifier on its part of the batches, and they would drift apart,
and of them pull the model to different places. Here they begin alike and have the mean of the gradients, as
DistributedDataParallel has it for the model.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from tileloss.distributed import is_distributed


class OwnParameters(dict[str, nn.Parameter]):
    """By name, the parameters of a loss that are not its model's.

    Every process calls the methods, at the same places of the training loop. Alone, they do nothing.

    Args:
        loss: a module that holds the model, or several such modules in one.
        model: the model, which may have been wrapped since the loss was made.

    >>> own = OwnParameters(loss, model)  # doctest: +SKIP
    >>> own.broadcast()  # doctest: +SKIP
    >>> loss(columns, labels).backward()  # doctest: +SKIP
    >>> own.average_gradients()  # before gradients are clipped, unscaled or applied  # doctest: +SKIP
    """

    def __init__(self, loss: nn.Module, model: nn.Module) -> None:
        shared = {id(parameter) for parameter in model.parameters()}
        super().__init__((name, x) for name, x in loss.named_parameters() if id(x) not in shared)

    def broadcast(self) -> None:
        """Give all processes the values of the first."""
        if is_distributed():
            for parameter in self.values():
                dist.broadcast(parameter.data, src=0)

    def average_gradients(self) -> None:
        """Give all processes the mean of their gradients; where one has none, as of a loss that it did not call, zero.

        What has a gradient nowhere is left without. One number for each parameter is exchanged and waited for, and
        then the gradients.
        """
        if not (self and is_distributed()):
            return
        parameters = list(self.values())
        some = torch.tensor([x.grad is not None for x in parameters], dtype=torch.int32, device=parameters[0].device)
        dist.all_reduce(some)
        for parameter, has_any in zip(parameters, some.tolist(), strict=True):
            if has_any:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = gradient.div_(dist.get_world_size())  # first, lest the sum of float16 ones overflow
                dist.all_reduce(parameter.grad)
