"""What griffe does not read in docstrings: one entry for several names, results without a type, bare examples."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

NAMES = re.compile(r"^    ([a-z]\w*(?:, [a-z]\w*)+)(: .+(?:\n {8}.+)*)", re.MULTILINE)
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class Sections(griffe.Extension):
    """Writes them out, in the form in which griffe looks for sections and entries."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for each object that it has read."""
        if obj.docstring is None:
            return
        text = NAMES.sub(_an_entry_each, obj.docstring.value)
        text = EXAMPLE.sub(lambda found: f"Examples:\n{textwrap.indent(found[0], '    ')}", text)
        if obj.is_function and obj.returns is not None:
            text = text.replace("Returns:\n    ", f"Returns:\n    {obj.returns}: ")
        obj.docstring.value = text


def _an_entry_each(found: re.Match[str]) -> str:
    return "\n".join(f"    {name}{found[2]}" for name in found[1].split(", "))
