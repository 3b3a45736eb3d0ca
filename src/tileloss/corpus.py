"""The built-in corpus: (docstring, source) pairs of the Python code that is installed with the interpreter.

Problem: a first training run should need no download, yet learn from real text that people wrote. Method: every Python
installation carries tens of thousands of documented functions. Each file is parsed with `ast` (nothing is imported or
run), the prose of a function's docstring becomes the query, and the function with every docstring cut out becomes the
document. Whole modules are held out, and a docstring or a body that was seen before is dropped wherever it occurs, so
that no function is in both parts. Trade-off: what is installed decides the corpus, so the counts, which are
printed, differ between machines; the split of a given module never does.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import inspect
import io
import logging
import multiprocessing
import re
import sys
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tileloss.errors import InputError

if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)

# tests document themselves, not a task; vendored copies and other environments are someone else's code seen twice
SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "_vendor",
        "dist-packages",
        "extern",
        "idle_test",
        "site-packages",
        "test",
        "testing",
        "tests",
        "vendor",
    }
)
MINIMUM_WORDS = 4
MAXIMUM_FILE_BYTES = 1_000_000
# where prose ends and reference begins: a field list, a doctest, a section title, or a directive
_REFERENCE = re.compile(
    r"^\s*(:\w+|>>>|\.\. |@\w+|```|~~~"
    r"|(args?|arguments?|attributes|examples?|inputs?|keyword arg(ument)?s|notes?|outputs?|param(eter)?s?"
    r"|raises|references|returns?|see also|shape|todo|usage|warnings?|yields?)\s*:?\s*$"
    r"|(args?|arguments?|returns?|raises|parameters?|yields?)\s*:)",
    re.IGNORECASE,
)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
# the other statements that a definition can stand in; everything else is not worth the visit
Compound = ast.If | ast.Try | ast.ExceptHandler | ast.With | ast.For | ast.While


class SourceFile(NamedTuple):
    """A file to read and the dotted name of the module that it holds."""

    path: Path
    module: str


class Pair(NamedTuple):
    """One documented function: its docstring's prose, its source without docstrings, and where it is defined."""

    docstring: str
    code: str
    module: str
    package: str


def installed_folders() -> list[Path]:
    """The folders of the standard library and of the installed packages, the standard library first."""
    folders = [Path(sysconfig.get_paths()["stdlib"])]
    folders += [Path(entry) for entry in sys.path if Path(entry).name in {"site-packages", "dist-packages"}]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def source_files(folders: Iterable[Path]) -> list[SourceFile]:
    """Every Python file below `folders` outside tests and vendored copies, in an order that is always the same."""
    files = []
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if SKIPPED_FOLDERS.isdisjoint(parts) and not parts[-1].startswith("test_"):
                files.append(SourceFile(path, ".".join(parts).removesuffix(".__init__")))
    return files


def prose(docstring: str) -> str:
    """The describing paragraphs of a docstring on one line, up to the first list of parameters, doctest or section."""
    kept: list[str] = []
    for line in inspect.cleandoc(docstring).splitlines():
        if _REFERENCE.match(line):
            break
        if line and set(line) <= set("-=~^*"):
            # an underlined title: the title is no prose either
            kept = kept[:-1]
            break
        kept.append(line)
    return " ".join(" ".join(kept).split())


def _definitions(body: Sequence[ast.stmt]) -> Iterator[Definition]:
    """The functions and classes defined in `body`, at any depth of definitions, conditions and try blocks."""
    for statement in body:
        if isinstance(statement, Definition):
            yield statement
        elif not isinstance(statement, Compound):
            continue
        for nested in ("body", "orelse", "handlers", "finalbody"):
            yield from _definitions(getattr(statement, nested, ()))


def _docstring_node(node: Definition) -> ast.Constant | None:
    """The literal that is the docstring of `node`; its `value` is a string."""
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first.value
    return None


def without_docstrings(function: Function, lines: Sequence[str]) -> str:
    """The source of `function`, dedented, without blank lines, its own docstring and those of everything inside it.

    Args:
        function: a definition from the parsed file.
        lines: the file's lines, without line ends.
    """
    start = function.lineno - 1
    kept = list(lines[start : function.end_lineno])
    for node in (function, *_definitions(function.body)):
        literal = _docstring_node(node)
        if literal is None or literal.end_lineno is None or literal.end_col_offset is None:
            continue
        first, last = literal.lineno - 1 - start, literal.end_lineno - 1 - start
        # ast counts columns in UTF-8 bytes; a docstring may share its lines with code on either side
        before = kept[first].encode()[: literal.col_offset].decode()
        after = kept[last].encode()[literal.end_col_offset :].decode()
        kept[first : last + 1] = [before + after.lstrip("; ")] + [""] * (last - first)
    return textwrap.dedent("\n".join(line.rstrip() for line in kept if line.strip()))


def _is_stub(function: Function) -> bool:
    """Whether nothing is left of the function without its docstring, `pass` and `...`."""
    rest = function.body[1:]
    return all(
        isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in rest
    )


def read_pairs(file: SourceFile) -> list[Pair] | None:
    """The documented functions of one file in the order of the text, or None where it cannot be decoded or parsed."""
    try:
        content = file.path.read_bytes()
        if len(content) > MAXIMUM_FILE_BYTES or (b'"""' not in content and b"'''" not in content):
            return []
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        text = io.TextIOWrapper(io.BytesIO(content), encoding).read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError, RecursionError, MemoryError):
        return None
    lines = text.split("\n")
    package = file.module.split(".")[0]
    pairs = []
    for function in _definitions(tree.body):
        literal = _docstring_node(function)
        if literal is None or isinstance(function, ast.ClassDef) or _is_stub(function):
            continue
        docstring = prose(str(literal.value))
        if len(docstring.split()) >= MINIMUM_WORDS:
            pairs.append(Pair(docstring, without_docstrings(function, lines), file.module, package))
    return pairs


def _read_files(files: Sequence[SourceFile]) -> list[list[Pair] | None]:
    # millions of short-lived nodes without one cycle: the collector only costs, a third of the time
    enabled = gc.isenabled()
    gc.disable()
    try:
        return [read_pairs(file) for file in files]
    finally:
        if enabled:
            gc.enable()


def _read_all(files: Sequence[SourceFile], workers: int, progress: bool) -> list[list[Pair] | None]:
    """`read_pairs` of every file, in order, in chunks over `workers` processes."""
    from tqdm.auto import tqdm

    chunks = [files[start : start + 64] for start in range(0, len(files), 64)]
    results: list[list[Pair] | None] = []
    with contextlib.ExitStack() as stack:
        read: Iterable[list[list[Pair] | None]] = map(_read_files, chunks)
        if workers > 1:
            # spawned, not forked: torch's threads are already running in this process
            context = multiprocessing.get_context("spawn")
            read = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context)).map(_read_files, chunks)
        bar = stack.enter_context(tqdm(total=len(files), desc="reading installed code", disable=not progress))
        for chunk in read:
            results.extend(chunk)
            bar.update(len(chunk))
    return results


def unique_pairs(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs whose docstring and whose code both occur for the first time, letter case and spacing aside."""
    docstrings: set[str] = set()
    codes: set[str] = set()
    kept = []
    for pair in pairs:
        docstring, code = pair.docstring.lower(), "".join(pair.code.split())
        if docstring not in docstrings and code not in codes:
            kept.append(pair)
        docstrings.add(docstring)
        codes.add(code)
    return kept


def is_held_out(module: str, fraction: float) -> bool:
    """Whether `module` belongs to the held-out part: decided by a hash of its name alone, on every machine alike."""
    digest = hashlib.blake2b(module.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64


def find_pairs(folders: Sequence[Path] | None = None, *, workers: int = 1, progress: bool = False) -> list[Pair]:
    """The documented functions of every Python file below `folders`, each once; counts are logged.

    Arguments, order, cost and errors are those of `builtin_corpus`.
    """
    folders = installed_folders() if folders is None else [Path(folder) for folder in folders]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise InputError(f"Not a folder: {', '.join(missing)}.")
    files = source_files(folders)
    results = _read_all(files, workers, progress)
    if unreadable := sum(result is None for result in results):
        logger.warning("%d of %d files could not be decoded or parsed, and were left out.", unreadable, len(files))
    found = [pair for result in results for pair in result or ()]
    pairs = unique_pairs(found)
    logger.info(
        "%d files, %d documented functions, %d after duplicates are dropped.", len(files), len(found), len(pairs)
    )
    return pairs


def builtin_corpus(
    folders: Sequence[Path] | None = None,
    *,
    held_out: float = 0.1,
    workers: int = 1,
    progress: bool = False,
) -> DatasetDict:
    """(docstring, code) pairs of the installed Python code, split by module.

    Args:
        folders: where to look for Python files; the standard library and the installed packages by default.
        held_out: the share of modules in the "test" part, between 0 and 1.
        workers: processes that parse. More than one needs the main script to be guarded by `if __name__ ==
            "__main__"`, as every use of `multiprocessing` does.
        progress: show a progress bar.

    Returns:
        A `datasets.DatasetDict` with "train" and "test", each with the string columns docstring, code, module and
        package. The order is that of the folders, the paths and the text.

    Raises:
        InputError: for a share outside (0, 1), a folder that does not exist, or where no documented function is found.

    Time: about 5 MB of source per second and process; memory: that of the pairs (some 60 MB for 55,000).
    """
    from datasets import Dataset, DatasetDict

    if not 0 < held_out < 1:
        raise InputError(f"held_out is the share of modules to hold out, between 0 and 1, got {held_out}.")
    pairs = find_pairs(folders, workers=workers, progress=progress)
    parts: dict[str, list[Pair]] = {"train": [], "test": []}
    for pair in pairs:
        parts["test" if is_held_out(pair.module, held_out) else "train"].append(pair)
    if empty := [name for name, part in parts.items() if not part]:
        raise InputError(
            f"No documented function for the {' and the '.join(empty)} part: {len(pairs)} were found in all. "
            f"Give folders with more modules, or another held_out than {held_out}."
        )
    return DatasetDict(
        {
            name: Dataset.from_dict({field: [getattr(pair, field) for pair in part] for field in Pair._fields})
            for name, part in parts.items()
        }
    )
