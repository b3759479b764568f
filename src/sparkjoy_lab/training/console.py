"""Progress while runs go on, and tables when they are done; needs the extra [cli]."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from sparkjoy_lab.training.loop import OnStep, Record
from sparkjoy_lab.training.settings import Settings

if TYPE_CHECKING:
    from pandas import DataFrame

REFRESH_SECONDS = 0.2
WIDTH_OF_FILES = 160
WIDTH_WITH_BAR = 110
"""Columns of a terminal that has room for a bar beside what a run has come to."""


class LiveRuns:
    """A live line for each run in progress and one for all; without a terminal, one line per finished run.

    Args:
        runs: how many runs there will be.
    """

    def __init__(self, runs: int) -> None:
        # No refreshing thread: it would take time from the run it reports on, and seconds are measured there.
        console = Console()
        bar = [BarColumn(bar_width=20)] if console.width >= WIDTH_WITH_BAR else []
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            *bar,
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn(
                "{task.fields[state]}", table_column=Column(ratio=1, no_wrap=True)
            ),  # what else there is room for
            console=console,
            auto_refresh=False,
            expand=True,
            disable=not console.is_terminal,
        )
        self._all = self._progress.add_task("all runs", total=runs, state="", visible=runs > 1)
        self._free: list[TaskID] = []
        self._lock = threading.RLock()  # runs in several processes are followed by as many threads
        self._drawn_at = 0.0
        self._started = False

    def __enter__(self) -> LiveRuns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started:
            self._progress.stop()

    @contextmanager
    def run(self, name: str, settings: Settings) -> Iterator[OnStep]:
        """Show a run; what comes back is called after each of its steps."""
        with self._lock:
            line = self._free.pop() if self._free else self._progress.add_task("", total=1, state="")
            self._progress.reset(line, description=name, total=settings.steps, state="")
        last: Record | None = None
        stepped = False

        def on_step(step: int, record: Record | None) -> None:
            nonlocal last, stepped
            last, stepped = record, True
            if time.monotonic() - self._drawn_at >= REFRESH_SECONDS:
                with self._lock:
                    self._progress.update(line, completed=step, state=_state(record, settings.updates))
                    self._draw()

        yield on_step
        with self._lock:
            self._progress.advance(self._all)
            self._free.append(line)
            if stepped and last is not None:
                self._progress.update(line, completed=last["step"], state=_state(last, settings.updates))
                self._draw()
                if not self._progress.console.is_terminal:
                    said = f"{name}: {_state(last, settings.updates)}"
                    self._progress.console.print(said, highlight=False, soft_wrap=True)

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        if not self._started:  # only now: a run that is refused says nothing else
            self._progress.start()
            self._started = True
        self._progress.refresh()


@contextmanager
def study_progress() -> Iterator[Callable[[float, str], None]]:
    """A live bar; what comes back is told the fraction done and what comes next."""
    columns = (BarColumn(bar_width=20), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console()
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=1.0)

        def advance(fraction: float, what: str) -> None:
            progress.update(task, completed=fraction, description=what)
            progress.refresh()

        yield advance


def print_table(title: str, frame: DataFrame) -> None:
    """Print a frame: what is in its index to the left, its columns to the right and never broken."""
    table = Table(title=title)
    words = frame.index.nlevels
    shown = frame.reset_index()
    for number, column in enumerate(shown.columns):
        table.add_column(str(column), justify="left" if number < words else "right", no_wrap=number >= words)
    for row in shown.itertuples(index=False, name=None):
        table.add_row(*map(_cell, row))
    console = Console()  # as wide as the terminal; wide enough for any table where there is none, such as in a file
    (console if console.is_terminal else Console(width=WIDTH_OF_FILES)).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _state(record: Record | None, updates: int) -> str:
    if record is None:
        return ""
    kept = record["kept"] / (record["samples"] * updates)
    price = "" if record["price"] is None else f"  price {record['price']:.3g}"
    found = record.get("comparison") or {}
    compared = "" if found.get("cosine") is None else f"  cosine {found['cosine']:.2f}"
    lost = f"  nothing kept of {', '.join(map(str, record['lost'][:5]))}" if record.get("lost") else ""
    return f"error {100 * record['error']:.2f}%  kept {100 * kept:.3g}%{price}{compared}{lost}"
