"""The command line: `tileloss <command> ...`. Each command is a module with `main(argv)`, imported when called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": ("tileloss.train", "train an embedding model, by default on the Python code installed here"),
    "bench": ("tileloss.bench", "measure time and memory of the losses against other implementations"),
    "doctor": (
        "tileloss.doctor",
        "say what is installed and what would run, and check that it computes what it should",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 when done, 1 for failed, 2 for wrong input, 130 when interrupted.

    Args:
        argv: the arguments without the program's name; those of the process by default.
    """
    listing = "\n".join(f"  {name:<8} {summary}" for name, (_, summary) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="tileloss",
        description="The losses of sentence-transformers, computed tile by tile.",
        epilog=f"commands:\n{listing}\n\n`tileloss <command> --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help=", ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the options of the command")
    options = parser.parse_args(argv)
    try:
        command = importlib.import_module(COMMANDS[options.command][0])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "tileloss":
            raise
        print(
            f"tileloss {options.command} needs the package {error.name!r}, which is not installed. "
            f"Install what the command uses with: pip install 'tileloss[{options.command}]'",
            file=sys.stderr,
        )
        return 1
    from tileloss.errors import BackendError, InputError

    try:
        return command.main(options.arguments) or 0
    except (InputError, BackendError) as error:
        print(f"tileloss {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
