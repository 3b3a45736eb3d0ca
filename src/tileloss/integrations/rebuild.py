"""Losses that were made from sentence-transformers' classes, rebuilt from ours.

Problem: a loss object exists already, perhaps deep inside wrappers, with a trained classifier and hooks of its own.
Method: ours is constructed with the settings that are read back from the object's attributes, and is then given the
very modules, parameters, buffers and hooks of the object, so that both share one state. Whatever might make the value
another one is left as it is, and named: subclasses, methods replaced on the object, settings that cannot be read back
or come out differently. Trade-off: what a wrapper keeps outside of its registered modules is not seen.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from tileloss.errors import InputError, KindError
from tileloss.integrations.sentence_transformers import counterparts

logger = logging.getLogger(__name__)

_Losses = TypeVar("_Losses")

# where a constructor's argument is kept, if not under its own name
_ATTRIBUTES = {
    "margin": ("margin", "triplet_margin"),
    "model": ("model", "sentence_embedder", "model2", "encoder"),
    "use_mini_batched_version": ("uses_gradient_cache",),
}
# whose constructor loads what the object has already, and whose settings all are attributes
_BARE = frozenset({"DenoisingAutoEncoderLoss"})
# what a module keeps for itself: never copied as a setting
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def accelerate(loss: _Losses) -> _Losses:
    """A loss of sentence-transformers rebuilt from our class of the same name, with the same settings and state.

    The new loss shares model, parameters (a classifier, a projection, a trained scale), hooks and training mode with
    the old one, and has its value and gradients. Losses inside other modules are replaced there. What is not certain
    to keep its value stays as it is: subclasses, also sentence-transformers' own (sparse losses), objects with methods
    of their own, compiled losses, and losses whose settings cannot be read back. What was replaced, and what was left
    and why, is logged, as warnings.

    Args:
        loss: a loss; a module with losses among its children, which is changed in place; or a dict, list or tuple of
            these, such as a trainer's losses by data set.

    Returns:
        The rebuilt loss, the given module, or a new dict, list or tuple.

    Raises:
        KindError (a TypeError): for anything else, such as a class or a function that makes a loss.
        ModuleNotFoundError: where sentence-transformers is not installed.

    >>> loss = tileloss.accelerate(losses.MatryoshkaLoss(model, inner, [768, 256]))  # doctest: +SKIP
    """
    walk = _Walk()
    found = walk.any(loss, "loss")
    replaced = ", ".join(f"{name} at {path}" for path, name in walk.replaced.items()) or "nothing"
    logger.warning(f"tileloss.accelerate replaced {replaced}.")
    for path, reason in walk.left.items():
        logger.warning(f"tileloss.accelerate left {path} as it is: {reason}.")
    return found


class _CannotRebuild(Exception):
    """Why an object stays as it is."""


class _Walk:
    """One pass over an object and what it holds; an object that occurs twice is rebuilt once."""

    def __init__(self) -> None:
        self.replaced: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self._done: dict[int, tuple[nn.Module, nn.Module]] = {}  # with the old ones, whose ids are then not reused

    def any(self, value: Any, path: str) -> Any:
        if isinstance(value, nn.Module):
            return self.module(value, path)
        if isinstance(value, Mapping):
            return {key: self.any(item, f"{path}[{key!r}]") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.any(item, f"{path}[{index}]") for index, item in enumerate(value))
        raise KindError(
            "accelerate takes a loss object, a module that holds losses, or a dict, list or tuple of them; "
            f"{path} is {value!r}. Of a function that makes losses, accelerate what it returns."
        )

    def module(self, old: nn.Module, path: str, *, cut_by_parent: bool = False) -> nn.Module:
        """The module that takes the place of `old`: itself, unless it is a stock loss that can be rebuilt."""
        if type(old) not in counterparts():
            return self._holder(old, path)
        try:
            _check_untouched(old, cut_by_parent)  # ahead of what is known: it depends on where the loss stands
            if id(old) in self._done:
                return self._done[id(old)][1]
            new = self._rebuilt(old, path)
        except _CannotRebuild as reason:
            self.left[path] = str(reason)
            return old
        self._done[id(old)] = old, new
        self.replaced[path] = type(old).__name__
        return new

    def _holder(self, module: nn.Module, path: str) -> nn.Module:
        """A module that is no stock loss, with the losses inside it replaced."""
        if id(module) in self._done:
            return module
        self._done[id(module)] = module, module
        stock = next((kind.__name__ for kind in type(module).__mro__ if kind in counterparts()), None)
        if stock is not None:
            self.left[path] = f"{type(module).__name__} is a subclass of {stock}, and may compute something else"
        for name, child in list(module._modules.items()):
            if child is not None and (new := self.module(child, f"{path}.{name}")) is not child:
                module._modules[name] = new
        return module

    def _rebuilt(self, old: nn.Module, path: str) -> nn.Module:
        cuts = hasattr(old, "matryoshka_dims")
        children = {
            name: self.module(child, f"{path}.{name}", cut_by_parent=cuts)
            for name, child in old._modules.items()
            if child is not None
        }
        if cuts and _is_cut(children["loss"]):
            raise _CannotRebuild(f"{path}.loss, which it has changed, could not be rebuilt")
        new = _constructed(counterparts()[type(old)], old, children)
        _share_state(old, new, children)
        _check_same(old, new)
        return new


def _constructed(kind: type[nn.Module], old: nn.Module, children: Mapping[str, nn.Module]) -> nn.Module:
    """A loss of ours with the old one's settings; its state is still its own."""
    if kind.__name__ in _BARE:
        new = kind.__new__(kind)
        nn.Module.__init__(new)
        new._modules.update(dict.fromkeys(children))
        return new
    settings = _settings(old, children)
    with warnings.catch_warnings(), _random_state_kept(old):
        warnings.simplefilter("ignore", DeprecationWarning)  # said when the old loss was made
        try:
            return kind(**settings)
        except InputError as error:
            raise _CannotRebuild(f"tileloss does not take its settings: {error}") from error


def _check_untouched(loss: nn.Module, cut_by_parent: bool) -> None:
    """Refuse objects on which a method was replaced, or which are compiled."""
    if loss._compiled_call_impl is not None:
        raise _CannotRebuild("it is compiled; accelerate it first, then compile it")
    for name, value in vars(loss).items():
        if not inspect.isfunction(getattr(type(loss), name, None)):
            continue
        own_method = isinstance(value, MethodType) and value.__self__ is loss and value.__func__ in _functions(loss)
        if not own_method and not (cut_by_parent and name == "calculate_loss" and _is_cut(loss)):
            raise _CannotRebuild(f"its method {name} was replaced on the object")


def _functions(loss: nn.Module) -> list[Any]:
    return [getattr(kind, name) for kind in type(loss).__mro__ for name in vars(kind)]


def _is_cut(loss: nn.Module) -> bool:
    """Whether a stock MatryoshkaLoss around this one, a single one, has put its widths into its `calculate_loss`."""
    decorator = vars(loss).get("calculate_loss")
    inner = getattr(decorator, "fn", None)
    return (
        type(decorator).__name__ == "CachedLossDecorator" and isinstance(inner, MethodType) and inner.__self__ is loss
    )


def _settings(old: nn.Module, children: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The constructor's arguments, read back from the object; losses among them are the rebuilt ones."""
    settings = {}
    for name in list(inspect.signature(type(old).__init__).parameters)[1:]:
        derived = _DERIVED.get((type(old).__name__, name))
        if derived is not None:
            settings[name] = derived(old, children)
            continue
        attribute = next((key for key in _ATTRIBUTES.get(name, (name,)) if hasattr(old, key)), None)
        if attribute is None:
            raise _CannotRebuild(f"its argument {name!r} cannot be read back; construct it from tileloss.losses")
        settings[name] = children.get(attribute, getattr(old, attribute))
    return settings


def _columns_of_the_classifier(loss: Any) -> int:
    both = 2 * loss.concatenation_sent_rep
    return both + loss.concatenation_sent_difference + loss.concatenation_sent_multiplication


# arguments that are no attribute: how they follow from the object and its rebuilt children
_DERIVED: dict[tuple[str, str], Callable[[Any, Mapping[str, Any]], Any]] = {
    # their first encoder is a copy of the model: of a module without weights, since it is the old one that is shared
    ("ContrastiveTensionLoss", "model"): lambda old, children: nn.Identity(),
    ("ContrastiveTensionLossInBatchNegatives", "model"): lambda old, children: nn.Identity(),
    ("ContrastiveTensionLossInBatchNegatives", "scale"): lambda old, children: old.logit_scale.exp().item(),
    ("SoftmaxLoss", "embedding_dimension"): lambda old, children: (
        old.classifier.in_features // _columns_of_the_classifier(old)
    ),
    ("Matryoshka2dLoss", "loss"): lambda old, children: children["loss"].loss,
    ("Matryoshka2dLoss", "matryoshka_dims"): lambda old, children: old.loss.matryoshka_dims,
    ("Matryoshka2dLoss", "matryoshka_weights"): lambda old, children: old.loss.matryoshka_weights,
    ("Matryoshka2dLoss", "n_dims_per_step"): lambda old, children: old.loss.n_dims_per_step,
}


def _share_state(old: nn.Module, new: nn.Module, children: Mapping[str, nn.Module]) -> None:
    """Give the new loss the old one's modules (losses among them rebuilt), tensors, hooks, mode and attributes."""
    new._modules.update({name: child for name, child in children.items() if name in new._modules})
    new._parameters.update({name: tensor for name, tensor in old._parameters.items() if name in new._parameters})
    new._buffers.update({name: tensor for name, tensor in old._buffers.items() if name in new._buffers})
    for name, value in vars(old).items():
        if name in _OF_EVERY_MODULE:
            if "hook" in name:
                vars(new)[name] = value  # the very dicts, which the handles that remove hooks refer to
        elif not hasattr(type(old), name) and (name in vars(new) or not hasattr(new, name)):
            vars(new)[name] = value
    new.training = old.training


def _check_same(old: Any, new: Any) -> None:
    """Refuse what did not take over every parameter, or shows other settings."""
    if {id(p) for p in old.parameters()} != {id(p) for p in new.parameters()}:
        raise _CannotRebuild("its parameters have no place in the loss of tileloss")
    if old.get_config_dict() != new.get_config_dict():
        raise _CannotRebuild("the loss of tileloss would have other settings")


def _random_state_kept(loss: nn.Module) -> AbstractContextManager[None]:
    """A block that leaves the random state as it was: layers that a constructor fills are replaced right after."""
    devices = {parameter.device for parameter in loss.parameters() if parameter.device.type != "cpu"}
    kinds = {device.type for device in devices} or {"cuda"}
    return torch.random.fork_rng([device.index for device in devices], device_type=kinds.pop())
