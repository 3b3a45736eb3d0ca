"""Models whose inputs cannot be cut into mini-batches, told without importing the library that they come from."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def reads_static_embeddings(model: nn.Module) -> bool:
    """Whether a model's first module is a StaticEmbedding, alone or behind a Router.

    It takes the tokens of all texts in one line, with the places where texts begin, so that no tensor has a row for
    each text.
    """
    for wrapper in ("_orig_mod", "module"):  # of torch.compile, of DistributedDataParallel
        model = getattr(model, wrapper, model)
    return any("StaticEmbedding" in _class_names(module) for module in _input_modules(model))


def _input_modules(model: nn.Module) -> Iterator[nn.Module]:
    if not isinstance(model, nn.Sequential) or not len(model):
        return
    first = model[0]
    if "Router" in _class_names(first):
        yield from (route[0] for route in first.sub_modules.values())  # type: ignore[operator]
    else:
        yield first


def _class_names(module: nn.Module) -> list[str]:
    return [kind.__name__ for kind in type(module).__mro__]
