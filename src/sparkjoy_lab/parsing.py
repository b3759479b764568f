"""A command line read by tyro, whose complaints become one line."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
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
        if stop.code != 2:  # --help, or a SIGTERM that came meanwhile
            raise
        lines = [line.strip(" │|") for line in said.getvalue().splitlines()]
        words = itertools.dropwhile(_is_rule, lines[1:])  # after the box's own upper edge
        sentence = " ".join(itertools.takewhile(lambda line: not _is_rule(line), words))
        sentence = re.sub(r"^Error parsing [\w.]+: ", "", sentence)  # a name of ours, of a part of the flags
        raise ValueError(f"{sentence.rstrip('.')}. {_meant(lines)}See {program} --help.") from None


def _meant(lines: list[str]) -> str:
    """The flags that tyro finds most like the unknown ones: each follows a heading."""
    headings = ("Perhaps you meant:", "Arguments similar to ")
    found = {flag.split()[0].rstrip(",") for line, flag in itertools.pairwise(lines) if line.startswith(headings)}
    return f"Did you mean {', '.join(sorted(found))}? " if found else ""


def _is_rule(line: str) -> bool:
    return "────" in line or "----" in line
