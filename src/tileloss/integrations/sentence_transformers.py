"""The loss classes of sentence-transformers under its own names, but ours: for scripts whose imports stay as they are.

Problem: a script takes its losses from sentence-transformers, by one of several import paths, and may have done so
already. Method: the classes are looked for, by identity, in every module that is loaded: those of the library's own
losses, and those of whoever imported from them; where one stands, ours is put. What derives from a stock class keeps
its base, and so do the library's other modules: the losses for sparse encoders stay what they are. Trade-off: only
names in modules are found. A class that is kept elsewhere (in a list, as a default argument) remains the stock one.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import ModuleType, TracebackType
from typing import NamedTuple

from torch import nn

from tileloss.errors import VersionError

logger = logging.getLogger(__name__)

TESTED_VERSIONS = ("6.0.1", "6.2.0")
PACKAGE = "sentence_transformers"
_LOSSES = f"{PACKAGE}.sentence_transformer.losses"
# packages whose losses derive from the stock ones: loaded before anything is replaced, so that they get their bases
_DERIVING = (f"{PACKAGE}.sparse_encoder.losses", f"{PACKAGE}.multi_vector_encoder.losses")


class Replacement(NamedTuple):
    """A name in a module, and the class that it had."""

    module: ModuleType
    name: str
    stock: type[nn.Module]
    ours: type[nn.Module]


class Patch:
    """What one call of `patch_sentence_transformers` has replaced, until `undo`, or the end of a `with` block.

    Attributes:
        replacements: where which class was replaced.
    """

    def __init__(self, replacements: Iterable[Replacement]) -> None:
        self.replacements = list(replacements)
        for module, name, _, ours in self.replacements:
            vars(module)[name] = ours  # past a module's own `__setattr__`: that of deprecated import paths keeps it

    @property
    def classes(self) -> list[str]:
        """The names of the classes, each once."""
        return sorted({replacement.stock.__name__ for replacement in self.replacements})

    def undo(self) -> None:
        """Put back what was there, but for names that somebody else has bound anew since."""
        for module, name, stock, ours in reversed(self.replacements):
            if vars(module).get(name) is ours:
                vars(module)[name] = stock
        self.replacements.clear()
        if self in _patches:
            _patches.remove(self)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


_patches: list[Patch] = []
_reported = False


def patch_sentence_transformers(*, allow_untested: bool = False) -> Patch:
    """Let the names of sentence-transformers' losses stand for ours, in its modules and in those that imported them.

    Every import path counts, old and new, before the call or after it; `isinstance` with such a name holds for the
    losses that are made from then on. Objects that were made earlier stay as they are (see `tileloss.accelerate`), and
    so do classes that were derived from a stock one earlier, among them the losses for sparse encoders. What was
    replaced is logged, as a warning the first time. Calling it again replaces what was imported in between.

    Args:
        allow_untested: go ahead with a version of sentence-transformers that this was not tested with.

    Returns:
        What undoes it: by its `undo()`, or at the end of a `with` block.

    Raises:
        VersionError (a RuntimeError): for a version that is none of `TESTED_VERSIONS`.
        ModuleNotFoundError: where sentence-transformers is not installed.

    Time: one look at every name in every loaded module, some hundredths of a second, and the import of
    sentence-transformers where it was not loaded yet.

    >>> with patch_sentence_transformers():  # doctest: +SKIP
    ...     from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    ...     loss = MultipleNegativesRankingLoss(model)
    >>> type(loss).__module__  # doctest: +SKIP
    'tileloss.losses.multiple_negatives_ranking'
    """
    version = _loaded_version()
    check_version(version, allow_untested)
    for name in _DERIVING:
        with suppress(ModuleNotFoundError):  # older versions have fewer
            importlib.import_module(name)
    patch = Patch(list(_found()))
    if patch.replacements:
        _patches.append(patch)
        _report(patch.classes, version)
    return patch


def unpatch_sentence_transformers() -> None:
    """Put sentence-transformers' own classes back wherever `patch_sentence_transformers` has replaced them.

    A module that was imported in between, and took a class of ours by one of those names, keeps it.
    """
    while _patches:
        _patches[-1].undo()


@functools.cache
def counterparts() -> dict[type[nn.Module], type[nn.Module]]:
    """Each loss class of sentence-transformers that we have, and ours. Imports both libraries' losses."""
    from tileloss import losses

    stock = importlib.import_module(_LOSSES)
    names = [name for name in losses.__all__ if hasattr(stock, name)]
    pairs = {getattr(stock, name): getattr(losses, name) for name in names}
    # what is no loss (distances to choose from, a data loader) stays: our losses know the stock ones too
    return {theirs: ours for theirs, ours in pairs.items() if issubclass(theirs, nn.Module)}


def check_version(version: str, allow_untested: bool) -> None:
    """Refuse versions of sentence-transformers whose classes ours were not compared with."""
    if version not in TESTED_VERSIONS and not allow_untested:
        raise VersionError(
            f"sentence-transformers {version} is installed; tileloss was tested in its place with "
            f"{' and '.join(TESTED_VERSIONS)} only. Install one of these, or say that you accept the risk with "
            "allow_untested=True (on the command line: --allow-untested)."
        )


def _loaded_version() -> str:
    try:
        return str(importlib.import_module(PACKAGE).__version__)
    except ModuleNotFoundError as error:
        if error.name != PACKAGE:
            raise
        raise ModuleNotFoundError(
            "There is no sentence-transformers here whose losses could be replaced; "
            "install it with: pip install sentence-transformers",
            name=PACKAGE,
        ) from None


def _found() -> Iterator[Replacement]:
    """Every name in a loaded module that stands for a stock class and is to stand for ours."""
    ours_by_id = {id(stock): ours for stock, ours in counterparts().items()}
    for module in list({id(module): module for module in sys.modules.values()}.values()):
        if not isinstance(module, ModuleType) or not _takes_part(module):
            continue
        for name, value in list(vars(module).items()):
            ours = ours_by_id.get(id(value))
            if ours is not None and not _builds_on(module, value):
                yield Replacement(module, name, value, ours)


def _takes_part(module: ModuleType) -> bool:
    name = module.__name__
    package, _, _ = name.partition(".")
    if package == PACKAGE:
        return name == _LOSSES or name.startswith(f"{_LOSSES}.")
    return package != "tileloss"


def _builds_on(module: ModuleType, stock: type) -> bool:
    """Whether one stock loss's module uses another's class: stock code, of which subclasses are left, keeps it."""
    return module.__name__.startswith(f"{_LOSSES}.") and stock.__module__ != module.__name__


def _report(classes: list[str], version: str) -> None:
    global _reported
    level, _reported = logging.INFO if _reported else logging.WARNING, True
    names = ", ".join(classes)
    logger.log(
        level, f"tileloss stands in for {len(classes)} loss classes of sentence-transformers {version}: {names}."
    )
    derived = [kind for stock in counterparts() for kind in stock.__subclasses__()]
    foreign = sorted({f"{kind.__module__}.{kind.__qualname__}" for kind in derived if not _is_stock(kind)})
    if foreign:
        logger.log(level, f"Left on stock classes, from which they were derived before: {', '.join(foreign)}.")


def _is_stock(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == PACKAGE
