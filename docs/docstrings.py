"""What the site changes of docstrings: Markdown would take the prompts of their examples for quotations."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)>>> .*\n?(?:.*\S.*\n?)*", flags=re.MULTILINE)
"""As doctest has it: up to a line that is blank."""


class Examples(griffe.Extension):
    """Fences the examples."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called with every object of the package."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value)


def fenced(example: re.Match[str]) -> str:
    indent, text = example[1], example[0].rstrip("\n")
    return f"{indent}```pycon\n{text}\n{indent}```\n"
