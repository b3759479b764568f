"""The figure of quality against cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparkjoy_lab.studies.drawing import draw, log_axes, name_lines, panels, styles
from sparkjoy_lab.studies.frames import mean_curves
from sparkjoy_lab.training.loop import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COSTS = {
    "step": "optimizer steps",
    "backward": "samples differentiated",
    "seconds": "seconds, sampling included",
}
SHOWN = ("dg", "unbiased noise 0.3", "kondo 3%", "uniform 3%", "pg", "kondo 10%")
"""Five of these have a colour; the table has all arms."""


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
