"""Losses that hold their model under a name of their own, in trainers that look for it under "model".

sentence-transformers' trainer puts a wrapped model (data parallel, compiled) into the child that is called "model",
and passes by losses which have none: their gradients are then not averaged between processes. Here that name leads to
the model, while parameters and saved states keep sentence-transformers' own name for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn


class NamedModelLoss(nn.Module):
    """A loss whose attribute `model` is its attribute of the name `_holds_model_as`."""

    _holds_model_as: ClassVar[str]

    @property
    def model(self) -> nn.Module:
        """The model, for trainers that look for it here."""
        return getattr(self, self._holds_model_as)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(self._holds_model_as if name == "model" else name, value)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As every module has it, with the model under the name that trainers look for."""
        for name, child in super().named_children():
            yield "model" if name == self._holds_model_as else name, child
