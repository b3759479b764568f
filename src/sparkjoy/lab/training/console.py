"""Progress while runs go on, and tables when they are done; needs the extra [cli]."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from sparkjoy.lab.training.loop import OnStep, Record
from sparkjoy.lab.training.settings import Settings

REFRESH_SECONDS = 0.2
WIDTH_OF_FILES = 160


class LiveRuns:
    """A live line for the run in progress and one for all runs; without a terminal, one line per finished run.

    Args:
        runs: how many runs there will be.
    """

    def __init__(self, runs: int) -> None:
        # No refreshing thread: it would take time from the run it reports on, and seconds are measured there.
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            auto_refresh=False,
        )
        self._all = self._progress.add_task("all runs", total=runs, state="", visible=runs > 1)
        self._current = self._progress.add_task("", total=1, state="")
        self._drawn_at = 0.0
        self._started = False

    def __enter__(self) -> LiveRuns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started:
            self._progress.stop()

    def start(self, name: str, settings: Settings) -> OnStep:
        """Show a new run; what comes back is called after each of its steps."""
        self._progress.reset(self._current, description=name, total=settings.steps, state="")

        def on_step(step: int, record: Record | None) -> None:
            done = step >= settings.steps or _reached(record, settings.until_error)
            now = time.monotonic()
            if not done and now - self._drawn_at < REFRESH_SECONDS:
                return
            self._drawn_at = now
            if not self._started:  # only now: a run that is refused says nothing else
                self._progress.start()
                self._started = True
            self._progress.update(self._current, completed=step, state=_state(record, settings.updates))
            if done:
                self._progress.advance(self._all)
                if not self._progress.console.is_terminal and record is not None:
                    line = f"{name}: {_state(record, settings.updates)}"
                    self._progress.console.print(line, highlight=False, soft_wrap=True)
            self._progress.refresh()

        return on_step


@contextmanager
def study_progress() -> Iterator[Callable[[float, str], None]]:
    """A live bar; what comes back is told the fraction done and what comes next."""
    columns = (BarColumn(bar_width=20), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, auto_refresh=False) as progress:
        task = progress.add_task("", total=1.0)

        def advance(fraction: float, what: str) -> None:
            progress.update(task, completed=fraction, description=what)
            progress.refresh()

        yield advance


def print_runs(summaries: list[Record], target_error: float) -> None:
    """One row an arm: means over seeds of error, samples and seconds, and when the target error was reached."""
    seeds = len({run["seed"] for run in summaries})
    table = Table(title=f"mean ± sd over {seeds} seeds; on the right, when {100 * target_error:g}% was reached")
    for column in ("arm", "error %", "backward", "ms/step", "steps", "backward", "seconds"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=column != "arm")
    for arm in dict.fromkeys(run["arm"] for run in summaries):
        runs = [run for run in summaries if run["arm"] == arm]
        table.add_row(
            arm,
            _mean_sd([100 * run["error"] for run in runs]),
            f"{np.mean([run['backward_samples'] for run in runs]):,.0f}",
            f"{1000 * np.mean([run['seconds']['total'] / run['step'] for run in runs]):.2f}",
            *_to_target(runs),
        )
    _console().print(table)


def print_scores(rows: list[dict[str, Any]]) -> None:
    """One row a baseline and score."""
    table = Table(title="means over seeds, ± standard deviation")
    for column in ("baseline", "score", "error %", "seeds", "backward samples"):
        table.add_column(column, justify="right" if column in ("error %", "seeds", "backward samples") else "left")
    for row in rows:
        spread = "" if row["error_sd"] is None else f" ± {100 * row['error_sd']:.2f}"
        error = f"{100 * row['error']:.2f}{spread}"
        table.add_row(row["baseline"], row["score"], error, str(row["seeds"]), f"{row['backward_samples']:,.0f}")
    _console().print(table)


def print_screening(tables: dict[str, list[dict[str, Any]]]) -> None:
    """One row an arm of every part."""
    shared = ("task", "arm", "error", "mean_error")
    screeners = ("recall", "draft_recall", "spearman", "seconds_over_forward", "learn_over_forward")
    columns = {"screeners": (*shared, *screeners), "noise": shared, "unbiased": (*shared, "step", "backward_samples")}
    for part, rows in tables.items():
        if not rows:
            continue
        table = Table(title=f"{part}: means over {max(row['seeds'] for row in rows)} seeds")
        for column in columns[part]:
            words = column in ("task", "arm")
            table.add_column(column.replace("_", " "), justify="left" if words else "right", no_wrap=not words)
        for row in rows:
            values = [row[column] for column in columns[part]]
            table.add_row(*("" if value is None else _short(value) for value in values))
        _console().print(table)


def print_scaling(rows: list[dict[str, Any]]) -> None:
    """One row a method and prompt length: what all seeds spent, for each that reached the target, and over DG's."""
    table = Table(title="spent by all seeds, for each that reached the target error; on the right, as a part of dg's")
    for column in ("H", "arm", "learning rate", "solved", "answers", "tokens", "training s", "total s"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=column != "arm")
    for column in ("tokens", "training", "total"):
        table.add_column(column, justify="right", no_wrap=True)

    def of(length: int, arm: str) -> list[dict[str, Any]]:
        return [row for row in rows if (row["prompt_length"], row["arm"]) == (length, arm)]

    for length, arm in dict.fromkeys((row["prompt_length"], row["arm"]) for row in rows):
        of_arm = of(length, arm)
        costs, of_dg = _spent_per_solved(of_arm), _spent_per_solved(of(length, "dg"))
        solved = sum(row["answers"] is not None for row in of_arm)
        table.add_row(
            str(length),
            arm,
            f"{of_arm[0]['learning_rate']:g}",
            f"{solved} of {len(of_arm)}",
            *(f"{cost:,.0f}" if cost >= 1000 else f"{cost:.2f}" for cost in costs),
            *([""] * (4 - len(costs))),
            *(f"{cost / other:.3f}" for cost, other in zip(costs[1:], of_dg[1:], strict=False)),
        )
    _console().print(table)


def print_language(rows: list[Record], target: float) -> None:
    """One row an arm: held-out score, what was kept, seconds of a step, and steps and seconds to the target."""
    table = Table(title=f"means over {rows[0]['seeds']} seeds; on the right, to {target:.0%}, and over TRL's own")
    for column in ("arm", "right %", "±", "kept %", "steps", "s/step", "steps", "×", "seconds", "×"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=column != "arm")
    for row in rows:
        error, steps, seconds = row["standard_error"], row["step_to_target"], row["seconds_to_target"]
        table.add_row(
            row["arm"],
            f"{100 * row['score']:.1f}",
            "-" if error is None else f"{100 * error:.1f}",
            f"{100 * row['kept']:.1f}",
            f"{row['steps']:.0f}",
            f"{row['seconds_a_step']['total']:.2f}",
            "-" if steps is None else f"{steps:.1f}",
            "-" if row["step_of_dense"] is None else f"{row['step_of_dense']:.2f}",
            "-" if seconds is None else f"{seconds:.0f}",
            "-" if row["seconds_of_dense"] is None else f"{row['seconds_of_dense']:.2f}",
        )
    _console().print(table)


def print_budget(rows: list[dict[str, Any]]) -> None:
    """One row a task and arm: error or steps, that over DG's, what was kept, and seconds over DG's."""
    table = Table(title="mean over seeds; error after the same steps, or steps to the target error")
    for column in ("task", "arm", "lr", "solved", "error / steps", "of dg's", "kept", "seconds of dg's"):
        table.add_column(column, justify="left" if column in ("task", "arm") else "right", no_wrap=column != "task")
    for row in rows:
        value, spread = ("-", "") if row["value"] is None else _value_and_spread(row)
        ratios = ["-" if row[name] is None else f"{row[name]:.2f}" for name in ("value_of_dg", "seconds_of_dg")]
        solved = f"{row['solved']} of {row['seeds']}"
        kept = f"{100 * row['kept']:.1f}%"
        table.add_row(
            row["task"], row["arm"], f"{row['learning_rate']:g}", solved, value + spread, ratios[0], kept, ratios[1]
        )
    _console().print(table)


def print_frictions(rows: list[dict[str, Any]]) -> None:
    """One row a friction, strength and arm: errors at the end and over the whole run, and steps to the target."""
    table = Table(title="errors in %, means over seeds, and over dg's; steps to the target: median")
    columns = ("H", "friction", "arm", "lr", "error", "of dg's", "whole run", "of dg's", "solved", "steps", "kept")
    for column in columns:
        table.add_column(column, justify="left" if column in ("friction", "arm") else "right", no_wrap=True)
    for row in rows:
        strength = "" if row["strength"] is None else f" {row['strength']:g}"
        spread = "" if row["sd"] is None else f" ± {100 * row['sd']:.2f}"
        ratios = ["-" if row[name] is None else f"{row[name]:.2f}" for name in ("of_dg", "whole_run_of_dg")]
        table.add_row(
            str(row["prompt_length"]),
            row["friction"] + (f" {row['level'] + 1}" if row["friction"] == "all" else strength),
            row["arm"],
            f"{row['learning_rate']:g}",
            f"{100 * row['error']:.2f}{spread}",
            ratios[0],
            f"{100 * row['whole_run']:.1f}",
            ratios[1],
            f"{row['solved']} of {row['seeds']}",
            "-" if row["steps"] is None else f"{row['steps']:g}",
            f"{100 * row['kept']:.1f}%",
        )
    _console().print(table)


def _value_and_spread(row: dict[str, Any]) -> tuple[str, str]:
    unit, scale, digits = ("%", 100, 2) if row["measure"] == "error" else ("", 1, 0)
    spread = "" if row["sd"] is None else f" ± {scale * row['sd']:.{digits}f}{unit}"
    return f"{scale * row['value']:.{digits}f}{unit}", spread


def print_gains(records: list[dict[str, Any]]) -> None:
    """One row a size or body: milliseconds a step, and how many times the gate's DG's is."""
    table = Table(title="CPU milliseconds a step, medians; gain: DG's over the gate's, of the update and with sampling")
    for column in ("changed", "to", "B/F", "sample", "dg", "kondo", "gain", "with sampling"):
        table.add_column(column, justify="left" if column in ("changed", "to") else "right", no_wrap=True)
    for record in records:
        gains = (f"{record[name]:.1f}" for name in ("training_gain", "total_gain"))
        times = (f"{record[name]:.2f}" for name in ("flops_ratio", "sample", "dg", "kondo"))
        table.add_row(record["changed"], str(record["value"]), *times, *gains)
    _console().print(table)


def print_bench(result: dict[str, Any]) -> None:
    """One row an arm and rate: rows that passed backward, rows in a micro-batch, milliseconds, dense over its own."""
    ratio = result["backward_over_forward"]
    table = Table(
        title=f"one step without the optimizer, {result['parameters'] / 1e6:.3g}M parameters; "
        f"backward over forward {ratio['seconds']:.2f} in seconds, {ratio['flops']:.2f} in FLOPs"
    )
    for column in ("arm", "rate", "rows", "size", "p20 ms", "p50 ms", "p80 ms", "speed-up"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=column != "arm")
    for row in result["arms"]:
        milliseconds = [f"{1000 * value:,.1f}" for value in row["seconds"]["total"].values()]
        rate = "" if row["rate"] is None else f"{row['rate']:g}"
        sizes = (str(row["backward_rows"]), str(row["micro_batch_size"]))
        name = row["arm"] if row["noise"] is None else f"noise {row['noise']:g}"
        table.add_row(name, rate, *sizes, *milliseconds, f"{row['speedup']:.2f}")
    _console().print(table)
    if not result.get("memory"):
        return
    table = Table(title="peak memory of the step above weights, gradients and optimizer state")
    for column in ("arm", "rate", "size", "MB in tensors", "MB resident", "of undivided"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=column != "arm")
    undivided = result["memory"][0]["peak_bytes"]
    for row in result["memory"]:
        rate = "" if row["rate"] is None else f"{row['rate']:g}"
        resident = "" if row["peak_resident_bytes"] is None else f"{row['peak_resident_bytes'] / 1e6:,.1f}"
        peak = row["peak_bytes"]
        table.add_row(
            row["arm"], rate, str(row["micro_batch_size"]), f"{peak / 1e6:,.1f}", resident, f"{peak / undivided:.1%}"
        )
    _console().print(table)


def print_slopes(rows: list[dict[str, Any]]) -> None:
    """One row a baseline, number of arms and method: how what a cosine of 0.95 takes grows as p falls."""
    table = Table(title="needed for a mean cosine of 0.95: as what power of p")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*("" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    _console().print(table)


def _console() -> Console:
    """As wide as the terminal; wide enough for any table where there is none, such as in a file."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH_OF_FILES)


def _to_target(runs: list[Record]) -> list[str]:
    reached = [run["to_target"] for run in runs if run["to_target"] is not None]
    if len(reached) < len(runs):
        return [f"{len(reached)} of {len(runs)}", "", ""]
    means = [np.mean([first[key] for first in reached]) for key in ("step", "backward_samples", "seconds")]
    return [f"{means[0]:,.0f}", f"{means[1]:,.0f}", f"{means[2]:.2f}"]


def _spent_per_solved(rows: list[dict[str, Any]]) -> list[float]:
    """Answers, tokens, training and total seconds of all seeds over those that reached the target; none: nothing."""
    solved = sum(row["answers"] is not None for row in rows)
    names = ("answers", "backward_tokens", "training_seconds", "seconds")
    return [sum(row["spent"][name] for row in rows) / solved for name in names] if solved else []


def _short(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _mean_sd(values: list[float]) -> str:
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def _state(record: Record | None, updates: int) -> str:
    if record is None:
        return ""
    kept = record["kept"] / (record["samples"] * updates)
    price = "" if record["price"] is None else f"  price {record['price']:.3g}"
    found = record.get("comparison") or {}
    pairs = (("cosine", "cosine"), ("consistency", "dense consistency"), ("agreement", "agreement"))
    compared = "".join(f"  {said} {found[name]:.2f}" for name, said in pairs if found.get(name) is not None)
    return f"error {100 * record['error']:.2f}%  kept {100 * kept:.3g}%{price}{compared}"


def _reached(record: Record | None, until_error: float | None) -> bool:
    return until_error is not None and record is not None and record["error"] <= until_error
