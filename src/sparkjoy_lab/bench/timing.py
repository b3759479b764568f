"""Seconds of things to compare: arms take turns in one process; what else the machine does falls on all alike."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

Seconds = dict[str, list[float]]
"""Of every arm, one number a round."""
Values = Sequence[float] | np.ndarray[Any, Any]
PERCENTILES = (20, 50, 80)


class Turn(NamedTuple):
    """One arm in one round."""

    round: int
    arm: str
    seconds: float
    outcome: Any


def turns(
    arms: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[], object] = lambda: None,
    before: Callable[[int, str], object] = lambda number, arm: None,
) -> Iterator[Turn]:
    """Every arm once a round, each round beginning with another arm.

    >>> [(turn.round, turn.arm) for turn in turns({"a": list, "b": dict}, rounds=2, warm_up=0)]
    [(0, 'a'), (0, 'b'), (1, 'b'), (1, 'a')]

    Args:
        arms: what to time, by name.
        rounds: how often each is timed.
        warm_up: rounds before these, not given out.
        clock: `time.process_time` for CPU seconds, which other processes do not lengthen.
        wait: called before each reading of the clock, such as `torch.cuda.synchronize` or a barrier.
        before: called with round and arm ahead of each turn, not timed; warm-up rounds are below 0.

    Returns:
        The turns as they are taken.
    """
    names = list(arms)
    for number in range(-warm_up, rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            before(number, name)
            seconds, outcome = timed(arms[name], clock, wait)
            if number >= 0:
                yield Turn(number, name, seconds, outcome)


def timed(
    work: Callable[[], Any],
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[], object] = lambda: None,
) -> tuple[float, Any]:
    """Seconds of some work, and what it returned; clock and wait as those of `turns`."""
    wait()
    start = clock()
    outcome = work()
    wait()
    return clock() - start, outcome


class Laps:
    """A stopwatch of phases: `seconds` of each, from one lap to the next.

    Args:
        phases: all there may be.
    """

    def __init__(self, *phases: str) -> None:
        self.seconds = dict.fromkeys(phases, 0.0)
        self._began = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add what passed since the last lap, or since the beginning, to a phase."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._began
        self._began = now


def collect(taken: Iterable[Turn]) -> tuple[Seconds, dict[str, list[Any]]]:
    """Seconds and outcomes by arm, in the order of the rounds."""
    seconds: Seconds = {}
    outcomes: dict[str, list[Any]] = {}
    for turn in taken:
        seconds.setdefault(turn.arm, []).append(turn.seconds)
        outcomes.setdefault(turn.arm, []).append(turn.outcome)
    return seconds, outcomes


def percentiles(values: Values, scale: float = 1.0) -> dict[str, float]:
    """p20, p50 and p80 of some values, times `scale`: 1000 for milliseconds of seconds."""
    return {f"p{q}": float(np.percentile(values, q)) * scale for q in PERCENTILES}


def median(values: Values) -> float:
    """Of a round's figures."""
    return float(np.median(values))


def ratio(values: Values, others: Values) -> float:
    """The median over rounds of one arm's seconds over another's in the same round."""
    return float(np.median(np.array(values) / np.array(others)))


def machine(device: str = "cpu", *packages: str) -> dict[str, Any]:
    """What a figure needs beside it: the processor, torch's threads, and versions of Python, torch and packages."""
    versions = {}
    for package in ("torch", "numpy", "sparkjoy", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


def options(
    description: str | None, *, rounds: int | None = None, out: str | None = None, arms: Iterable[str] = ()
) -> argparse.ArgumentParser:
    """A parser with --out, and --rounds and --arms where these are given.

    Args:
        description: the script's docstring, shown as it stands.
        rounds: default of --rounds.
        out: default of --out, a JSON file or a folder; None: nothing is written unless it is given.
        arms: what --arms may name; all by default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None if out is None else Path(out), help="where figures go")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="times that every arm is timed")
    if arms:
        parser.add_argument("--arms", nargs="+", choices=list(arms), default=list(arms))
    return parser


def print_table(title: str, rows: Mapping[str, Mapping[str, float]], columns: Mapping[str, str]) -> None:
    """A line for every row of figures.

    >>> print_table("ms", {"dense": {"p50": 3.14159, "kept": 1}}, {"p50": "7.2f", "kept": "6.0%"})
    ms        p50   kept
    dense    3.14   100%

    Args:
        title: stands above the rows' names.
        rows: figures by the row's name.
        columns: of each figure shown, its format with the column's width.
    """
    width = max(map(len, (title, *rows)))
    print(f"{title:{width}}", *(f"{name:>{spec.split('.')[0].strip(',')}}" for name, spec in columns.items()))
    for name, row in rows.items():
        print(f"{name:{width}}", *(f"{row[figure]:{spec}}" for figure, spec in columns.items()), flush=True)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
