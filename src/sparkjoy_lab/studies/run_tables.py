"""What runs come to: their last records, and a table of what each arm cost."""

from __future__ import annotations

import pandas as pd

from sparkjoy_lab.studies.frames import grouped, mean_and_spread
from sparkjoy_lab.training.loop import Record, summary


def last_records(rows: list[Record], target_error: float | None) -> list[Record]:
    """The last record of every run, with when it reached the target error."""
    return [summary(of_run, target_error) for of_run in grouped(rows, "arm", "seed").values()]


def tables(rows: list[Record], target_error: float) -> dict[str, pd.DataFrame]:
    """One row an arm: means over seeds of error, samples and seconds, and when the target error was reached."""
    last = pd.json_normalize(last_records(rows, target_error), max_level=1)
    found = {arm: _row(runs) for arm, runs in last.groupby("arm", sort=False)}
    columns = ["error %", "backward", "ms/step", "steps", "backward", "seconds"]
    title = f"mean ± sd over {last['seed'].nunique()} seeds; on the right, when {100 * target_error:g}% was reached"
    index = pd.Index(list(found), name="arm")
    return {title: pd.DataFrame(list(found.values()), index=index, columns=columns)}


def _row(runs: pd.DataFrame) -> list[str]:
    names = ["to_target.step", "to_target.backward_samples", "to_target.seconds"]
    reached = runs.reindex(columns=names).dropna()
    first = [f"{len(reached)} of {len(runs)}", "", ""]
    if len(reached) == len(runs):
        step, backward, seconds = reached.mean()
        first = [f"{step:,.0f}", f"{backward:,.0f}", f"{seconds:.2f}"]
    milliseconds = 1000 * (runs["seconds.total"] / runs["step"]).mean()
    cost = [f"{runs['backward_samples'].mean():,.0f}", f"{milliseconds:.2f}"]
    return [mean_and_spread(100 * runs["error"]), *cost, *first]
