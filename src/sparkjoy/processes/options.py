"""What a step was told, in words that are the same on every process that was told the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

LONGEST = 200
"""Characters of one option that are looked at."""


def in_words(options: Mapping[str, Any]) -> str:
    """One line for each option, `name=value`, without addresses in memory.

    >>> print(in_words({"rate": 0.5, "loss": in_words}))
    rate=0.5
    loss=in_words
    """
    return "\n".join(f"{name}={_described(value)[:LONGEST]}".replace("\n", " ") for name, value in options.items())


def first_difference(texts: list[str]) -> str:
    """The first option that is not everywhere the same, and what it is where.

    >>> first_difference(["rate=0.5", "rate=0.1"])
    'rate is 0.5 on rank 0 and 0.1 on rank 1'
    """
    for rank, text in enumerate(texts):
        for here, there in zip(texts[0].splitlines(), text.splitlines(), strict=False):
            if here != there:
                (name, first), (_, other) = here.split("=", 1), there.split("=", 1)
                return f"{name} is {first} on rank 0 and {other} on rank {rank}"
    return "options differ"


def _described(value: Any) -> str:
    if isinstance(value, partial):
        named = [f"{name}={_described(given)}" for name, given in value.keywords.items()]
        return f"{_described(value.func)}({', '.join([*map(_described, value.args), *named])})"
    if isinstance(value, nn.Module):
        return type(value).__qualname__
    name = getattr(value, "__qualname__", None)
    if name is None:
        kind: Any = type(value)
        return kind.__qualname__ if kind.__repr__ is object.__repr__ else re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if _filled(cell)]
    plain_cells = [str(cell) for cell in cells if isinstance(cell, bool | int | float | str)]
    return f"{name}({', '.join(plain_cells)})" if plain_cells else str(name)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
