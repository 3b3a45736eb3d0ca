"""Training data: pairs (anchor, positive[, negative...]), or texts with a label, from anywhere or the built-in corpus.

Problem: pairs come as local files, as hub datasets, or not at all. Method: one function reads each of them through
the `datasets` library, checks the columns before any work, and hands over a training part, a held-out part and the
names of the text columns in their order. A dataset without a held-out split is split by a hash of the first text, so
that no such text is in both parts and the split is the same in every run. Labelled texts are read the same way, with
one text column and a column of class numbers. Trade-off: datasets are opened whole, not streamed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tileloss.corpus import builtin_corpus, is_held_out
from tileloss.errors import InputError
from tileloss.labelled_corpus import labelled_corpus

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

BUILTIN = "builtin"
LABEL_COLUMNS = ("label", "labels")
HELD_OUT_SPLITS = ("test", "validation", "dev")
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Labelled:
    """How texts with labels are drawn and evaluated.

    Attributes:
        per_label: texts of a label that are drawn together, an even number; see `tileloss.sampling`.
        group_column: a column of the evaluation set: a text's neighbour is looked for among those with another value.
    """

    per_label: int = 8
    group_column: str | None = None


@dataclass(frozen=True)
class TrainingData:
    """What `load_data` read.

    Attributes:
        train: the training part.
        held_out: the part that is only evaluated on.
        text_columns: the columns that hold text: anchor, positive, and any negatives; or one that the labels are of.
        group_column: for labelled texts, the column whose equal values mark texts that are near to each other anyway,
            such as functions of one file, or None.
    """

    train: Dataset
    held_out: Dataset
    text_columns: tuple[str, ...]
    group_column: str | None = None


def find_label_column(dataset: Dataset) -> str | None:
    """The column "label" or "labels" of `dataset`, or None.

    Raises:
        InputError: when it holds something other than numbers or lists of numbers.
    """
    name = next((name for name in LABEL_COLUMNS if name in dataset.column_names), None)
    if name is not None:
        feature = dataset.features[name]
        while hasattr(feature, "feature"):
            feature = feature.feature
        if _is_text(feature) or isinstance(feature, dict):
            raise InputError(
                f"The column {name!r} must hold numbers or lists of numbers, but it holds {dataset.features[name]}. "
                f"Give every class a number, for instance with dataset.class_encode_column({name!r})."
            )
    return name


def find_class_column(dataset: Dataset) -> str:
    """The column "label" or "labels" of `dataset`, which must hold one whole number for each row.

    Raises:
        InputError: when there is no such column, it holds something else, or values are missing.
    """
    name = find_label_column(dataset)
    if name is None:
        raise InputError(
            "A loss that learns from labels needs a column 'label' with the number of each text's class, and there is "
            f"only: {', '.join(dataset.column_names)}. Rename the column that holds it, or train on pairs with "
            "another loss, such as --loss multiple_negatives_ranking."
        )
    dtype = getattr(dataset.features[name], "dtype", None)
    if not (isinstance(dtype, str) and dtype.startswith(("int", "uint", "bool"))):
        raise InputError(
            f"The column {name!r} must hold one whole number for each row, the class of its text, but it holds "
            f"{dataset.features[name]}."
        )
    if missing := dataset.data.column(name).null_count:
        raise InputError(f"The column {name!r} has {missing} missing values; fill or drop those rows.")
    return name


def _is_text(feature: object) -> bool:
    return getattr(feature, "dtype", None) in {"string", "large_string", "string_view"}


def find_text_columns(
    dataset: Dataset, names: Sequence[str] | None = None, *, labelled: bool = False
) -> tuple[str, ...]:
    """The columns of `dataset` that hold text, checked.

    Args:
        dataset: rows to train or evaluate on.
        names: the columns to take, in this order; by default all but the label.
        labelled: whether the loss learns from labels, and reads a single text column.

    Raises:
        InputError: for an empty dataset, a column that does not exist, is no text or has missing values, one that is
            named twice, and fewer than two columns, or other than one where `labelled`.
    """
    columns = ", ".join(f"{name} ({feature.dtype if hasattr(feature, 'dtype') else feature})" for name, feature in dataset.features.items())  # fmt: skip  # noqa: E501
    if len(dataset) == 0:
        raise InputError(f"The dataset is empty. Its columns: {columns or 'none'}.")
    chosen = (
        tuple(name for name in dataset.column_names if name not in LABEL_COLUMNS) if names is None else tuple(names)
    )
    if unknown := [name for name in chosen if name not in dataset.column_names]:
        raise InputError(f"No column is called {unknown[0]!r}. There are: {columns}.")
    if len(set(chosen)) < len(chosen):
        raise InputError(f"A text column is named twice: {', '.join(chosen)}.")
    for name in chosen:
        if not _is_text(dataset.features[name]):
            raise InputError(
                f"The column {name!r} is not text. Name the text columns (anchor, positive, then any negatives), with "
                f"--text_columns on the command line. There are: {columns}."
            )
    if labelled and len(chosen) != 1:
        raise InputError(
            "A loss that learns from labels reads one text column. Name it, with --text_columns on the command line. "
            f"There are: {columns}."
        )
    if not labelled and len(chosen) < 2:
        remedy = "" if find_label_column(dataset) is None else (
            " Labelled texts go with a loss that learns from labels, such as --loss batch_hard."
        )  # fmt: skip
        raise InputError(f"Need at least two text columns, an anchor and a positive. There are: {columns}.{remedy}")
    for name in chosen:
        if missing := dataset.data.column(name).null_count:
            raise InputError(f"The column {name!r} has {missing} missing values; fill or drop those rows.")
    return chosen


def _read(source: str, workers: int) -> Dataset | DatasetDict:
    from datasets import load_dataset, load_from_disk

    path = Path(source)
    if path.is_file():
        if path.suffix not in FORMATS:
            raise InputError(
                f"Cannot tell the format of {source!r}: expected a name that ends in {', '.join(FORMATS)}."
            )
        options = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
        reading = f"{source!r} as {FORMATS[path.suffix]}"
        load = lambda: load_dataset(FORMATS[path.suffix], data_files=str(path), split="train", **options)  # noqa: E731
    elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        reading = f"the saved dataset {source!r}"
        load = lambda: load_from_disk(source)  # noqa: E731
    elif not path.exists() and (path.suffix in FORMATS or path.is_absolute() or source.startswith(".")):
        raise InputError(f"There is no file or folder {source!r}.")
    else:
        reading = f"the dataset {source!r}"
        load = lambda: load_dataset(source)  # noqa: E731
    try:
        return load()
    except Exception as error:
        # datasets raises many kinds, some with no more than "an error occurred"; the first cause tells why
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise InputError(f"Cannot read {reading}: {cause}") from error


def load_data(
    source: str,
    *,
    text_columns: Sequence[str] | None = None,
    held_out: float = 0.1,
    labelled: bool = False,
    workers: int = 1,
    progress: bool = False,
) -> TrainingData:
    """Read training data and hold a part of it out.

    Args:
        source: "builtin" for `tileloss.corpus` (where `labelled`: `tileloss.labelled_corpus`); a .json, .jsonl, .csv,
            .tsv or .parquet file; a folder that `Dataset.save_to_disk` or files of those formats are in; or the name
            of a dataset on the hub.
        text_columns: anchor, positive and any negatives, by column name; by default all columns but the label.
        held_out: the share held out where the dataset has no split named test, validation or dev.
        labelled: read one text column with a column of class numbers, not pairs. Where a part is held out here, rows
            of a class that is not learned from are dropped from it.
        workers: processes that read the built-in corpus (see `builtin_corpus`).
        progress: show progress where reading takes long.

    Returns:
        A `TrainingData`. Columns "label" or "labels", and those not named in `text_columns`, are kept.

    Raises:
        InputError: for a source that cannot be read, wrong columns (see `find_text_columns`), a share outside (0, 1),
            or a part that would be empty.
    """
    from datasets import DatasetDict

    if not 0 < held_out < 1:
        raise InputError(f"held_out is the share to hold out, between 0 and 1, got {held_out}.")
    group_column = None
    if source == BUILTIN:
        read = labelled_corpus if labelled else builtin_corpus
        found: Dataset | DatasetDict = read(held_out=held_out, workers=workers, progress=progress)
        text_columns = text_columns or (("code",) if labelled else ("docstring", "code"))
        group_column = "module" if labelled else None
    else:
        found = _read(source, workers)
    test = None
    if isinstance(found, DatasetDict):
        test = next((found[name] for name in HELD_OUT_SPLITS if name in found), None)
        if "train" not in found:
            raise InputError(f"The dataset {source!r} has no split named train, only {', '.join(found)}.")
        found = cast("Dataset", found["train"])
    # labels first: without them the advice is another loss, not another text column
    find_labels = find_class_column if labelled else find_label_column
    label = find_labels(found)
    chosen = find_text_columns(found, text_columns, labelled=labelled)
    if test is None:
        found, test = _split(found, chosen[0], held_out)
        if labelled:
            learned = set(found[label])
            test = test.select([row for row, value in enumerate(test[label]) if value in learned])
    else:
        find_labels(test)
        find_text_columns(test, chosen, labelled=labelled)
    return TrainingData(found, test, chosen, group_column)


def _split(dataset: Dataset, anchor: str, share: float) -> tuple[Dataset, Dataset]:
    """The training and the held-out rows of `dataset`, by a hash of the anchor."""
    chosen = [is_held_out(text, share) for text in dataset[anchor]]
    parts = [dataset.select([row for row, out in enumerate(chosen) if out is part]) for part in (False, True)]
    for name, part in zip(("training", "held-out"), parts, strict=True):
        if len(part) == 0:
            raise InputError(
                f"{len(dataset)} rows with held_out={share} leave nothing for the {name} part. "
                "Give more rows, another share, or a dataset with a split named test."
            )
    return parts[0], parts[1]
