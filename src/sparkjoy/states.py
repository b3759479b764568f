"""Saved states, checked before anything of them is taken up: whose they are, and whether they are whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sparkjoy import checks


def check(owner: str, given: Any, **fits: Callable[[Any], bool]) -> None:
    """`given` is a state that an object like `owner` saved: these entries and no others, each as it should be.

    >>> check("RollingQuantile(0.5)", {"scores": None}, scores=is_row)

    Raises:
        TypeError: no dict.
        ValueError: another object's state, or a damaged one.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"state is {checks.not_made(given)}; expected what state_dict() of {owner} returned, a dict.")
    if set(given) != set(fits):
        has, wanted = (", ".join(map(str, names)) or "nothing" for names in (given, fits))
        raise ValueError(
            f"state has {has}; expected {wanted}, as state_dict() of {owner} returns: load what an object of the same "
            "kind and options saved."
        )
    for name, fit in fits.items():
        if not fit(given[name]):
            raise ValueError(
                f"state has {name}: {checks.described(given[name])}, which state_dict() of {owner} does not return; "
                "load what an object of the same kind and options saved."
            )


def is_count(value: Any) -> bool:
    """Whether this is a whole number of at least 0."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and 0 <= int(value) <= checks.LARGEST


def is_row(value: Any) -> bool:
    """Whether this is None or a tensor (N,) of finite numbers, with at least one."""
    if value is None:
        return True
    try:
        checks.finite("a row", checks.row("a row", value))
    except (TypeError, ValueError):
        return False
    return True


def is_state(value: Any) -> bool:
    """Whether this may be a state, which its owner will check."""
    return isinstance(value, Mapping)
