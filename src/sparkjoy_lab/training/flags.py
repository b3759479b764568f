"""What every command checks of its flags before any work."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

SMALLEST = 1e-12
LARGEST = 1_000_000_000
LARGEST_SEED = 2**63 - 1


def named_once(flags: Sequence[str]) -> set[str]:
    """The names of the flags in a line, as `learning-rate`.

    Raises:
        ValueError: one has nothing at all, which would be read as this folder, or as zero; or is there twice, and all
            but the last would be dropped.
    """
    names: set[str] = set()
    for before, flag in zip(("", *flags), flags, strict=False):
        name, equals, value = flag.partition("=")
        if not flag or (name.startswith("--") and equals and not value):
            raise ValueError(f"{name or before} has an empty value; give one.")
        if name.startswith("--"):
            called = name[2:].replace("_", "-").removeprefix("no-")
            if called in names:
                raise ValueError(f"--{called} is given twice; give it once.")
            names.add(called)
    return names


def checked(command: Any, given: Set[str]) -> Any:
    """A command's dataclass with ~ in --out read as the user's home folder.

    Args:
        command: as parsed.
        given: the names of the flags that were in the line.

    Raises:
        ValueError: a number that is not finite or out of all proportion, a value twice in a list, a list of none, no
            such home folder.
    """
    for name, value in _flags(command):
        if value == () and name in given:
            raise ValueError(f"--{name} has no value; give one at least, or leave the flag out.")
        several = value if isinstance(value, tuple) else (value,)
        called = [f"{item:g}" if isinstance(item, float) else item for item in several]  # as runs are named
        if len(set(called)) < len(called):
            twice = next(item for item in called if called.count(item) > 1)
            raise ValueError(f"--{name} has {twice} twice; give each value once.")
        for item in several:
            _check_number(name, item)
    try:
        return replace(command, out=Path(command.out).expanduser())
    except RuntimeError as error:
        raise ValueError(f"--out {command.out}: {error}") from None


def refuse_idle(config: Any, goes_with: Mapping[str, tuple[bool, str]], defaults: Any = None) -> None:
    """Raise a ValueError where a flag was given that nothing would come of: the run would not be what it is called.

    Args:
        config: a dataclass of flags.
        goes_with: by a field's name whether it has an effect, and with what it would have one.
        defaults: has the values of flags that were not given; None: those of the config's class.
    """
    for name, (has_effect, others) in goes_with.items():
        value = getattr(config, name)
        if not has_effect and value != getattr(defaults or type(config), name):
            said = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise ValueError(f"--{name.replace('_', '-')} {said} goes with {others}; leave it out here.")


def need(extra: str, *modules: str) -> None:
    """Raise a ValueError that says what to install where a module is missing, before the work that would need it."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ValueError(f'{module} is missing; this command needs: pip install "sparkjoy[{extra}]".')


def _flags(config: Any) -> Iterator[tuple[str, Any]]:
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _flags(value)
        else:
            yield field.name.replace("_", "-"), value


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, float) and value != 0 and not SMALLEST <= abs(value) <= 1 / SMALLEST:
        raise ValueError(f"--{name} {value}: expected 0, or a number from {SMALLEST:g} to {1 / SMALLEST:g} in size.")
    if isinstance(value, int):
        most = LARGEST_SEED if "seed" in name else LARGEST
        most = max(64, os.cpu_count() or 1) if name == "threads" else most
        if abs(value) > most:
            raise ValueError(f"--{name} {value}: expected a number of at most {most:,} in size.")
