"""`python -m tileloss.run script.py ...`: a script with our losses in the place of sentence-transformers', unedited.

Problem: the script is not ours to edit. Method: it runs as it would by itself, under the name `__main__` and with its
own arguments; as soon as it has imported sentence-transformers, the library's names are given our classes. Torch alone
is imported ahead of it, so that what it sets for other libraries in the environment still counts. Trade-off: processes
that it spawns by itself start without; a launcher has to start this module in each (`torchrun -m tileloss.run x.py`).
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.metadata
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from tileloss.errors import VersionError
from tileloss.integrations.sentence_transformers import PACKAGE, check_version, patch_sentence_transformers


class _PatchOnImport(MetaPathFinder):
    """Waits for the import of sentence-transformers, once, and replaces its losses when it is loaded."""

    def __init__(self, allow_untested: bool) -> None:
        self.allow_untested = allow_untested

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != PACKAGE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = getattr(spec, "loader", None)
        if loader is not None:

            def load_and_patch(module: ModuleType) -> None:
                del loader.exec_module  # the instance's; its class has its own
                loader.exec_module(module)
                patch_sentence_transformers(allow_untested=self.allow_untested)

            loader.exec_module = load_and_patch
        return spec


def main(argv: Sequence[str] | None = None) -> int:
    """Run a script or a module as if by itself, and return 2 where there is none; its exit status passes through.

    Args:
        argv: the options, the script and its arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tileloss.run",
        description="Run a script that takes its losses from sentence-transformers with those of tileloss instead.",
    )
    parser.add_argument("--allow-untested", action="store_true", help="with any version of sentence-transformers")
    parser.add_argument("-m", dest="is_module", action="store_true", help="the script is the name of a module")
    parser.add_argument("script", help="its path, or the name of a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script is given")
    options = parser.parse_args(argv)
    obstacle = _obstacle(options)
    if obstacle:
        print(f"tileloss.run: {obstacle}", file=sys.stderr)
        return 2
    waiting = _PatchOnImport(options.allow_untested)
    if PACKAGE in sys.modules:
        patch_sentence_transformers(allow_untested=options.allow_untested)
    else:
        sys.meta_path.insert(0, waiting)
    sys.argv = [options.script, *options.arguments]
    try:
        if options.is_module:
            runpy.run_module(options.script, run_name="__main__", alter_sys=True)
        else:
            _put_first_on_the_path(Path(options.script))
            runpy.run_path(options.script, run_name="__main__")
    finally:
        if waiting in sys.meta_path:
            sys.meta_path.remove(waiting)
            print(f"tileloss.run: {options.script} never imported sentence-transformers.", file=sys.stderr)
    return 0


def _obstacle(options: argparse.Namespace) -> str:
    """Why the script cannot be run, or an empty string."""
    if options.is_module:
        try:
            found = importlib.util.find_spec(options.script) is not None
        except ModuleNotFoundError:  # of a package around it
            found = False
        if not found:
            return f"there is no module named {options.script!r}"
    elif not Path(options.script).exists():
        return f"there is no script at {options.script!r}"
    try:
        check_version(importlib.metadata.version("sentence-transformers"), options.allow_untested)
    except VersionError as error:
        return str(error)
    except importlib.metadata.PackageNotFoundError:
        pass  # none, or one that is not installed: its import will tell
    return ""


def _put_first_on_the_path(script: Path) -> None:
    """As Python does for a script: its folder comes first, in the place of the working directory's."""
    if sys.flags.safe_path:
        return
    folder = str(script.resolve().parent)
    if sys.path and sys.path[0] in ("", str(Path.cwd())):
        sys.path[0] = folder
    else:
        sys.path.insert(0, folder)


if __name__ == "__main__":
    sys.exit(main())
