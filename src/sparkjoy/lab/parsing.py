"""A command line read by tyro, whose complaints become one line."""

from __future__ import annotations

import contextlib
import io
import itertools
from typing import Any

import tyro


def parse(command: type, flags: list[str], program: str) -> Any:
    """An instance of a dataclass, from its flags.

    Raises:
        ValueError: what tyro would explain in a box.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(command, args=flags, prog=program)
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip(" │|") for line in said.getvalue().splitlines()]
        words = itertools.dropwhile(_is_rule, lines[1:])  # after the box's own upper edge
        sentence = " ".join(itertools.takewhile(lambda line: not _is_rule(line), words))
        raise ValueError(f"{sentence.rstrip('.')}. See {program} --help.") from None


def _is_rule(line: str) -> bool:
    return "────" in line or "----" in line
