"""What griffe cannot know of these docstrings: examples stand at the end without a heading, results without a type."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class Sections(griffe.Extension):
    """Writes both out, in the form in which griffe looks for sections."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for each object that it has read."""
        if obj.docstring is None:
            return
        text = EXAMPLE.sub(lambda found: f"Examples:\n{textwrap.indent(found[0], '    ')}", obj.docstring.value)
        if obj.is_function and obj.returns is not None:
            text = text.replace("Returns:\n    ", f"Returns:\n    {obj.returns}: ")
        obj.docstring.value = text
