"""What a loss trains beside its model: a classifier, a projection, a scale, a decoder.

Trainers wrap the model in DistributedDataParallel and not the loss, so that nothing averages the gradients of the
loss's own parameters: in several processes every one would train a classifier on its part of the batches, and they
would drift apart, and of them pull the model to different places. Here they begin alike and have the mean of the
gradients, as DistributedDataParallel has it for the model. And they are saved, which a model's own methods do not do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from tileloss.distributed import is_distributed
from tileloss.errors import InputError

LOSS_FILE = "loss.safetensors"


class OwnParameters(dict[str, nn.Parameter]):
    """By name, the parameters of a loss that are not its model's.

    Every process calls `broadcast` and `average_gradients`, at the same places of the training loop. In a process by
    itself they do nothing.

    Args:
        loss: a module that holds the model, or several by name, which then is the beginning of their parameters'.
        model: the model, which may have been wrapped since the loss was made.

    >>> own = OwnParameters(loss, model)  # doctest: +SKIP
    >>> own.broadcast()  # doctest: +SKIP
    >>> loss(columns, labels).backward()  # doctest: +SKIP
    >>> own.average_gradients()  # before gradients are clipped, unscaled or applied  # doctest: +SKIP
    """

    def __init__(self, loss: nn.Module | Mapping[str, nn.Module], model: nn.Module) -> None:
        super().__init__()
        known = {id(parameter) for parameter in model.parameters()}
        for prefix, module in (loss if isinstance(loss, Mapping) else {"": loss}).items():
            for name, parameter in module.named_parameters(prefix):
                if id(parameter) not in known:
                    known.add(id(parameter))
                    self[name] = parameter

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

    def save(self, folder: str | Path) -> None:
        """Write them to `loss.safetensors` in a folder; nothing, where there are none."""
        from safetensors.torch import save_file

        if self:
            save_file({name: x.detach().cpu().contiguous() for name, x in self.items()}, Path(folder) / LOSS_FILE)

    def load(self, folder: str | Path) -> None:
        """Take the values that `save` wrote.

        Raises:
            InputError (a ValueError): when the file is not there, or is of other parameters.
        """
        from safetensors.torch import load_file

        if not self:
            return
        file = Path(folder) / LOSS_FILE
        if not file.exists():
            raise InputError(f"{folder} has no {LOSS_FILE}, with what the loss owns: {', '.join(self)}.")
        weights = load_file(file)
        wrong = [name for name, x in self.items() if name not in weights or weights[name].shape != x.shape]
        if wrong:
            raise InputError(
                f"{file} is of another loss: it has nothing of the names and shapes of {', '.join(wrong)}."
            )
        with torch.no_grad():
            for name, parameter in self.items():
                parameter.copy_(weights[name])
