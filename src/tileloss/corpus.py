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
import gc
import hashlib
import inspect
import io
import logging
import multiprocessing
import re
import sys
import sysconfig
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
    {"__pycache__", "_vendor", "dist-packages", "extern", "idle_test", "site-packages", "test", "testing", "tests", "vendor"}
)
MINIMUM_WORDS = 4
MAXIMUM_FILE_BYTES = 1_000_000
# where prose ends and reference begins: a field list, a doctest, a section title, or a directive
_REFERENCE = re.compile(
    r"^\s*(:\w+|>>>|\.\. |@\w+|```|~~~"
    r"|(args?|arguments?|attributes|examples?|inputs?|keyword args|keyword arguments|notes?|outputs?|parameters?|params"
    r"|raises|references|returns?|see also|shape|todo|usage|warnings?|yields?)\s*:?\s*$"
    r"|(args?|arguments?|returns?|raises|parameters?|yields?)\s*:)",
    re.IGNORECASE,
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


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
    kept = []
    for line in inspect.cleandoc(docstring).splitlines():
        if _REFERENCE.match(line):
            break
        if line and set(line) <= set("-=~^*"):
            # an underlined title: the title is no prose either
            kept = kept[:-1]
            break
        kept.append(line)
    return " ".join(" ".join(kept).split())


def _functions(body: Sequence[ast.stmt]) -> Iterator[Function]:
    """The functions defined in `body` at any depth of classes, functions, conditions and try blocks."""
    for statement in body:
        if isinstance(statement, Function):
            yield statement
        for nested in ("body", "orelse", "handlers", "finalbody"):
            yield from _functions(getattr(statement, nested, ()))


def _docstring_node(node: Function | ast.ClassDef) -> ast.Constant | None:
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first.value
    return None


def without_docstrings(function: Function, lines: Sequence[str]) -> str:
    """The source of `function`, dedented, without its own docstring and those of everything defined inside it.

    Args:
        function: a definition from the parsed file.
        lines: the file's lines, without line ends.
    """
    kept = list(lines)
    for node in ast.walk(function):
        literal = _docstring_node(node) if isinstance(node, Function | ast.ClassDef) else None
        if literal is None or literal.end_lineno is None or literal.end_col_offset is None:
            continue
        first, last = literal.lineno - 1, literal.end_lineno - 1
        # ast counts columns in UTF-8 bytes
        before = lines[first].encode()[: literal.col_offset].decode()
        after = lines[last].encode()[literal.end_col_offset :].decode()
        kept[first : last + 1] = [before + after.lstrip("; ")] + [""] * (last - first)
    body = "\n".join(line.rstrip() for line in kept[function.lineno - 1 : function.end_lineno] if line.strip())
    return inspect.cleandoc("\n" + body)


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
    for function in _functions(tree.body):
        literal = _docstring_node(function)
        if literal is None or _is_stub(function):
            continue
        docstring = prose(literal.value)
        if len(docstring.split()) >= MINIMUM_WORDS:
            pairs.append(Pair(docstring, without_docstrings(function, lines), file.module, package))
    return pairs
