"""What runs with their costs come to: last records, the table, and quality against cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sparkjoy.lab.studies.drawing import draw, log_axes, name_lines, panels, styles
from sparkjoy.lab.studies.frames import grouped, mean_and_spread, mean_curves
from sparkjoy.lab.training.loop import Record, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COSTS = {
    "step": "optimizer steps",
    "backward": "samples differentiated",
    "seconds": "seconds, sampling included",
}
SHOWN = ("dg", "unbiased noise 0.3", "kondo 3%", "uniform 3%", "pg", "kondo 10%")
"""Five of these have a colour; the table has all arms."""


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


def plot(rows: list[Record]) -> Figure:
    """Error against steps, backward samples and seconds: means over seeds, bands from the best to the worst seed.

    The dashed line is the frontier: the lowest mean error of any arm for at most that cost.
    """
    curves = mean_curves(rows, "arm", backward="backward_samples", seconds="seconds.total")
    style = styles([row["arm"] for row in rows], SHOWN)
    figure, axes = panels(1, len(COSTS), 4.2, sharey=True)
    for axis, (cost, label) in zip(axes, COSTS.items(), strict=True):
        for arm, curve in curves.groupby("arm", sort=False):
            draw(axis, curve[cost], 100 * curve["error"], style[str(arm)], 100 * curve["best"], 100 * curve["worst"])
        every = curves.sort_values(cost, kind="stable")
        lowest = 100 * np.minimum.accumulate(every["error"])
        axis.step(every[cost], lowest, where="post", color="tab:purple", linestyle="--", linewidth=0.8, zorder=5)
        axis.set(xlabel=label)
        log_axes(axis)
    seeds = len({row["seed"] for row in rows})
    axes[0].set_ylabel("test error, %")
    figure.suptitle(
        f"{rows[0]['task']}: mean and range over {seeds} seeds; dashed: the lowest error for a cost, grey: other arms"
    )
    name_lines(axes[-1])
    return figure
