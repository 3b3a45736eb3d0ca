"""The built-in corpus with labels: installed functions without their docstrings, and the package that each is from.

Problem: a loss that learns from labels needs classes of texts that are alike in a way worth learning, and a held-out
part that cannot be solved by recognising a neighbour in the file. Method: the label of a function is its top-level
package, of those that have several modules. In each, whole modules are held out, chosen by a hash of their names, at
least two, so that a text's neighbour can be asked for in another module. A package needs four modules and 32
functions, and gives at most 500 to learn from, so that none makes up the batch. Trade-off: a package is one class
however much it does, and code that one of its modules copied from another, with changes, is on both sides.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tileloss.corpus import Pair, find_pairs
from tileloss.errors import InputError

if TYPE_CHECKING:
    from datasets import DatasetDict

MINIMUM_MODULES = 4
MINIMUM_FUNCTIONS = 32
MAXIMUM_FUNCTIONS = 500


def _by_hash(text: str) -> bytes:
    """A key that puts texts into an arbitrary order, the same on every machine."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def split_package(pairs: Sequence[Pair], held_out: float) -> tuple[list[Pair], list[Pair]]:
    """The functions of one package to learn from and to hold out; none where it is too small for both.

    No module is on both sides. At least two modules are held out and two kept; of each side at most
    `MAXIMUM_FUNCTIONS` or the corresponding share are taken.
    """
    modules = sorted({pair.module for pair in pairs}, key=_by_hash)
    if len(modules) < MINIMUM_MODULES or len(pairs) < MINIMUM_FUNCTIONS:
        return [], []
    outside = set(modules[: min(max(2, round(held_out * len(modules))), len(modules) - 2)])
    limits = MAXIMUM_FUNCTIONS, max(4, round(MAXIMUM_FUNCTIONS * held_out / (1 - held_out)))
    train, test = (
        sorted((pair for pair in pairs if (pair.module in outside) is held), key=lambda pair: _by_hash(pair.code))
        for held in (False, True)
    )
    return train[: limits[0]], test[: limits[1]]


def split_packages(pairs: Iterable[Pair], held_out: float) -> dict[str, tuple[list[Pair], list[Pair]]]:
    """The functions to learn from and those held out, by package, for the packages that have enough of both."""
    by_package: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_package[pair.package].append(pair)
    splits = {package: split_package(by_package[package], held_out) for package in sorted(by_package)}
    # one module of many functions may have taken all the places of the held-out ones
    return {
        package: (train, test)
        for package, (train, test) in splits.items()
        if len(train) > 1 and len({pair.module for pair in test}) > 1
    }


def labelled_corpus(
    folders: Sequence[Path] | None = None,
    *,
    held_out: float = 0.1,
    workers: int = 1,
    progress: bool = False,
) -> DatasetDict:
    """Installed Python functions labelled by their package, split by module.

    Args:
        folders: where to look for Python files; the standard library and the installed packages by default.
        held_out: the share of each package's modules in the "test" part, between 0 and 1.
        workers: processes that parse, as in `tileloss.corpus.builtin_corpus`.
        progress: show a progress bar.

    Returns:
        A `datasets.DatasetDict` with "train" and "test", each with the columns code (string), label (a `ClassLabel` of
        the package names, the same in both) and module (string).

    Raises:
        InputError: for a share outside (0, 1), a folder that does not exist, or fewer than two packages that are large
            enough.

    Time and memory: those of `builtin_corpus`.
    """
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    if not 0 < held_out < 1:
        raise InputError(f"held_out is the share of modules to hold out, between 0 and 1, got {held_out}.")
    splits = split_packages(find_pairs(folders, workers=workers, progress=progress), held_out)
    if len(splits) < 2:
        raise InputError(
            f"Need at least two packages of {MINIMUM_MODULES} modules and {MINIMUM_FUNCTIONS} documented functions "
            f"each, found {len(splits)}. Give folders with more packages, or a data set of your own."
        )
    features = Features({"code": Value("string"), "label": ClassLabel(names=list(splits)), "module": Value("string")})
    parts = {}
    for side, name in enumerate(("train", "test")):
        rows = [(pair.code, label, pair.module) for label, split in enumerate(splits.values()) for pair in split[side]]
        columns = dict(zip(features, map(list, zip(*rows, strict=True)), strict=True))
        parts[name] = Dataset.from_dict(columns, features=features)
    return DatasetDict(parts)
